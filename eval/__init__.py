from sd_mini.openmp import let_threads_sleep
from sd_mini.progress import quiet_libraries

let_threads_sleep()  # before torch is imported
quiet_libraries()

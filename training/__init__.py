from sd_mini.openmp import let_threads_sleep

let_threads_sleep()  # before torch is imported

"""Every metric of the report: they stand in report.json, on the page and in the card in this order."""

from eval.metrics.by_caption import BY_CAPTION
from eval.metrics.clip_score import CLIP
from eval.metrics.distances import DISTANCES
from eval.metrics.diversity import DIVERSITY
from eval.metrics.memorisation import MEMORISATION
from eval.metrics.reconstruction import RECONSTRUCTION
from eval.metrics.registry import METRICS, register

for metric in (DISTANCES, DIVERSITY, BY_CAPTION, CLIP, RECONSTRUCTION, MEMORISATION):
    register(metric)

__all__ = ["METRICS"]

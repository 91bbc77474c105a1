"""report.json and pictures => report.html: one file that needs no network and no script."""

from __future__ import annotations

import base64
import io
from typing import Any

import jinja2
import numpy as np

from eval.composition import CATEGORIES
from eval.measure import Gallery
from sd_mini import images

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Report: {{ protocol.data }}</title>
<style>
  body { font: 16px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem;
         color: #1b1b1b; background: #fff; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
  p { margin: .3rem 0 .8rem; max-width: 44rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  caption { text-align: left; font-weight: 600; padding: .3rem 0; }
  tr.total { font-weight: 600; }
  .splits { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
  .gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .8rem; }
  figure { margin: 0; break-inside: avoid; }
  figure img { width: 100%; image-rendering: pixelated; border: 1px solid #ddd; }
  figcaption { font-size: .8rem; line-height: 1.25; } figcaption i { color: #666; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; padding: .8rem;
       border: 1px solid #ccc; }
  dt { color: #555; } dd { grid-column: 2; margin: 0; overflow-wrap: anywhere; }
  @media (max-width: 30rem) { body { font-size: 14px; } th, td { padding: .2rem .3rem; } }
  @media print { body { max-width: none; padding: 0; } table, dl { break-inside: avoid; } }
</style>
</head>
<body>
<h1>What the pipeline makes of {{ protocol.data }}</h1>
{% if splits %}
<p><b>Exact</b> is the share of pictures in which every asked fact of the category holds, with its 95 % interval
(Wilson); a picture that cannot be read counts as wrong. <b>Ceiling</b> is the same for true drawings of the same scenes
passed through the autoencoder alone: what is lost there, no prompt and no noise predictor can win back.</p>
<div class="splits">
{% for split, rows in splits.items() %}
<table>
<caption>{{ split }}</caption>
<tr><th>category</th><th>exact</th><th>95 %</th><th>n</th><th>ceiling</th></tr>
{% for row in rows %}
<tr{% if row.category == "all" %} class="total"{% endif %}><td>{{ row.category.replace("_", " ") }}</td>
<td>{{ "%.1f" | format(100 * row.score.exact) }} %</td>
<td>{{ "%.1f" | format(100 * row.score.low) }}–{{ "%.1f" | format(100 * row.score.high) }}</td>
<td>{{ row.score.n }}</td><td>{{ "%.1f" | format(100 * row.ceiling.exact) }} %</td></tr>
{% endfor %}
</table>
{% endfor %}
</div>
{% else %}
<p>There are no composition scores: only the scenes of the shapes world come with a graph that a picture can be checked
against. These pictures are to be looked at; the autoencoder is measured.</p>
{% endif %}
{% if blame %}
<h2>Which stage is to blame</h2>
<p>Of all prompts of a split. The autoencoder: what even true drawings lose in it. The text encoder, at most: captions
that it does not tell from their twin, of those that are left: twice the misses of <b>binding</b>, below, as half of the
guesses are right. The noise predictor: the rest.</p>
<table>
<tr><th>split</th><th>exact</th><th>autoencoder</th><th>text encoder</th><th>noise predictor</th></tr>
{% for split, parts in blame.items() %}
<tr><td>{{ split }}</td><td>{{ percent(1 - parts.values() | sum) }}</td><td>{{ percent(parts.autoencoder) }}</td>
<td>{{ percent(parts.text_encoder) }}</td><td>{{ percent(parts.noise_predictor) }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if text %}
<h2>The text stage alone</h2>
<p>Measured on true pictures. Binding: how often a picture is nearer to its caption than to its twin, which differs in
one attribute or relation (chance 50 %), by the adapter and by a plain projection of the same encoder. Recall@k: how
often a caption finds its picture among the first k of n; in brackets by the plain projection.</p>
<table>
<tr><th>split</th><th>binding</th><th>95 %</th><th>plain projection</th>
<th>recall@1</th><th>@5</th><th>@10</th><th>n</th></tr>
{% for split, row in text.items() %}
<tr><td>{{ split }}</td><td>{{ percent(row.binding) }}</td>
<td>{{ "%.1f" | format(100 * row.binding_low) }}–{{ "%.1f" | format(100 * row.binding_high) }}</td>
<td>{{ percent(row.binding_projection) }}</td>
{% for k in (1, 5, 10) %}
<td>{{ percent(row["recall_at_%d" % k]) }} ({{ percent(row["recall_at_%d_projection" % k]) }})</td>
{% endfor %}
<td>{{ row.n }}</td></tr>
{% endfor %}
</table>
{% endif %}
<p>Reconstruction by the autoencoder: {{ "%.2f" | format(reconstruction.psnr) }} dB PSNR, the mean of
{{ reconstruction.n }} pictures.</p>
{% for gallery in galleries %}
<h2>{{ gallery.title }}</h2>
<p>{{ gallery.rule }}</p>
<div class="gallery">
{% for tile in gallery.tiles %}
<figure><img alt="{{ tile.prompt }}" src="data:image/png;base64,{{ png(tile.picture) }}">
<figcaption>{{ tile.prompt }}{% if tile.note %} <i>({{ tile.note }})</i>{% endif %}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
<h2>Seconds</h2>
<table>
{% for name, value in seconds.items() %}
<tr{% if name == "total" %} class="total"{% endif %}><td>{{ name.replace("_", " ") }}</td>
<td>{{ "%.1f" | format(value) }}</td></tr>
{% endfor %}
</table>
<h2>Protocol</h2>
<dl>
{% for name, value in protocol.items() %}
<dt>{{ name.replace("_", " ") }}</dt>
{% for key, inner in (value if value is mapping else {"": value}).items() %}
<dd>{{ key }} {{ inner }}</dd>
{% endfor %}
{% endfor %}
</dl>
</body>
</html>
"""


def render(report: dict[str, Any], galleries: list[Gallery]) -> str:
    """report.json's content and the pictures to show => the page, pictures embedded."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE).render(
        splits=_rows(report),
        reconstruction=report["reconstruction"],
        text=report.get("text"),
        blame=report.get("blame"),
        percent=lambda share: f"{100 * share:.1f} %",
        seconds=report["seconds"],
        protocol=report["protocol"],
        galleries=galleries,
        png=_png,
    )


def _rows(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By split, the categories it has, with what was made and the ceiling side by side."""
    return {
        split: [
            {"category": category, "score": scores[category], "ceiling": report["ceiling"][split][category]}
            for category in CATEGORIES
            if category in scores
        ]
        for split, scores in report.get("composition", {}).items()
    }


def _png(picture: np.ndarray) -> str:
    """(3, H, W) uint8 => an encoded PNG in base64."""
    encoded = io.BytesIO()
    images.to_pil(picture[None])[0].save(encoded, "PNG")
    return base64.b64encode(encoded.getvalue()).decode("ascii")

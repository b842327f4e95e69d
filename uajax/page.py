"""Pages that are one file: no network, no scripts; pictures and plots lie in them.

All text from outside is escaped here, where it is put into the page.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from uajax.types import FPS

_PLOT_PX = (900, 90)
_COLOURS = ("#c33", "#36c", "#393")
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}
td{padding:.15rem .8rem .15rem 0;vertical-align:top}td:first-child{color:#666}
li{margin:.3rem 0}img{width:100%}svg{width:100%;height:auto;background:#fafafa;display:block}
figure{margin:.8rem 0}figcaption{color:#666;font-size:.9rem}
"""


def document(title: str, body: Iterable[str]) -> str:
  """A page of that title (text) with the parts of its body (HTML)."""
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{"".join(f"{part}{chr(10)}" for part in body)}</body></html>
"""


def heading(text: str) -> str:
  return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
  return f"<p>{html.escape(text)}</p>"


def bullets(lines: Sequence[str], none: str) -> str:
  """A list of texts, or the one line that says that there are none."""
  return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines or [none])}</ul>"


def table(rows: Iterable[Sequence[str]]) -> str:
  """Rows of texts; the first column is grey."""
  cells = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows)
  return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def picture(image: UInt8[np.ndarray, "h w 3"], what: str) -> str:
  """A picture as JPEG within the page."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=85)
  encoded = base64.b64encode(file.getvalue()).decode()
  return f'<img alt="{html.escape(what)}" src="data:image/jpeg;base64,{encoded}">'


def plot(
  title: str,
  series: Mapping[str, Float[np.ndarray, " f"]],
  *,
  grey: Iterable[tuple[int, int]] = (),
  dashed: Iterable[int] = (),
) -> str:
  """Up to three lines over time, a value a frame, as an SVG figure; gaps where it is not finite.

  Args:
    grey: spans of frames [begin, end) to be shaded.
    dashed: frames to be marked.
  """
  width, height = _PLOT_PX
  values = np.stack([np.asarray(row, np.float64) for row in series.values()])
  frames = values.shape[1]
  known = values[np.isfinite(values)]
  low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
  room = max(high - low, 1e-6)
  parts = [
    f'<rect x="{width * a / frames:.1f}" width="{width * (b - a) / frames:.1f}" y="0"'
    f' height="{height}" fill="#ddd"/>'
    for a, b in grey
  ]
  parts += [
    f'<line x1="{width * b / frames:.1f}" x2="{width * b / frames:.1f}" y1="0" y2="{height}"'
    ' stroke="#999" stroke-dasharray="3"/>'
    for b in dashed
  ]
  for row, colour in zip(values, _COLOURS, strict=False):
    edges = np.flatnonzero(np.diff(np.isfinite(row), prepend=False, append=False))
    for begin, end in edges.reshape(-1, 2):
      every = max((end - begin) // 1500, 1)  # points enough for any screen
      line = " ".join(
        f"{width * (f + 0.5) / frames:.1f},{height - 4 - (height - 8) * (row[f] - low) / room:.1f}"
        for f in range(begin, end, every)
      )
      parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
  names = ", ".join(
    f'<span style="color:{colour}">{html.escape(name)}</span>'
    for name, colour in zip(series, _COLOURS, strict=False)
  )
  return (
    f'<figure><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(parts)}</svg>'
    f"<figcaption>{html.escape(title)}: {names}; {low:.2f} to {high:.2f}, over"
    f" {frames / FPS:.1f} s</figcaption></figure>"
  )

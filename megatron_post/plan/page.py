"""Renders a plan as one self-contained HTML page, with memory bars and the pipeline's timeline in SVG."""

from megatron_post.display import html_text
from megatron_post.plan.estimate import Plan, layout_line, verdict
from megatron_post.plan.hardware import GIB
from megatron_post.plan.report import time_rows
from megatron_post.plan.schedule import Event
from megatron_post.plan.shape import model_parameters

COLOURS = [
    "#3b6ea8", "#6fa1d6", "#9db8d2", "#5b4a8a", "#8d7bbf", "#c08a3e", "#d9ad6a", "#4f8f6b",
    "#86bd9c", "#b3564d", "#d58d84", "#7d7d7d", "#a5a5a5", "#4a5a66", "#c9c9c9",
]  # fmt: skip
WIDTH, _LABEL = 1000, 70
STYLE = """
:root { --ink: #1b1f24; --paper: #ffffff; --faint: #6a737d; --line: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #15191e; --faint: #9aa4ae; --line:
#39414a; } } body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
max-width: 1040px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p { margin: .3rem 0 } .faint { color: var(--faint) } svg { width: 100%; height: auto; display: block }
text { fill: var(--ink); font: 12px system-ui, sans-serif } .verdict { white-space: pre-wrap; padding: .6rem
.9rem; border-left: 4px solid #4f8f6b; margin: 1rem 0 } .verdict.no { border-color: #b3564d }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 1rem 0 } dt { color: var(--faint); font-size:
.85rem } dd { margin: 0; font-size: 1.25rem } ul.key { list-style: none; display: flex; flex-wrap: wrap; gap:
.2rem 1.2rem; padding: 0; margin: .5rem 0; font-size: .85rem } .key i { display: inline-block; width: .8rem;
height: .8rem; margin-right: .35rem; vertical-align: -1px }
"""


def page(plan: Plan) -> str:
    """The whole document."""
    title = f"{plan.config.stage} on {plan.gpus} x {plan.gpu.name}"
    facts = {
        "a step": f"{plan.time.seconds:.2f} s",
        "tokens/s/GPU": f"{plan.tokens_per_second_per_gpu:,.0f}",
        "MFU (bf16 peak)": f"{plan.model_flops_utilization:.1%}",
        "mean bubble": f"{plan.time.timeline.bubble:.1%}",
        "fullest rank": f"{plan.fullest.total / GIB:.1f} GiB",
        "parameters": f"{model_parameters(plan.config):,}",
    }
    entries = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    notes = "".join(f'<p class="faint">{html_text(note)}</p>' for note in plan.notes)
    fits = "" if plan.shortfall <= 0 else " no"
    pack = f"{plan.microbatches} microbatches of {plan.config.data.pack_length:,} tokens a data-parallel rank"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html_text(title)}</title><style>{STYLE}</style></head><body>
<h1>{html_text(title)}</h1>
<p class="faint">{html_text(layout_line(plan.config, plan.data_size))}; {pack}</p>
<div class="verdict{fits}">{html_text(verdict(plan))}</div>
<dl>{entries}</dl>{notes}
<h2>Memory of each pipeline rank</h2>
{_memory(plan)}
<h2>Time of a step on the busiest rank</h2>
{_time(plan)}
<h2>The pipeline</h2>
<p class="faint">Forward passes are blue, and backward passes are ochre. Later chunks of the model are darker.
Gaps are the bubble.</p> {_timeline(plan)}
<p class="faint">Predicted by megatron-post's planner. docs/planner.md says what was measured and what is
assumed.</p> </body></html>
"""


def _memory(plan: Plan) -> str:
    kinds = list(dict.fromkeys(kind for rank in plan.memory for kind in rank.kinds))
    scale = (WIDTH - _LABEL - 90) / max(plan.gpu.memory, plan.fullest.total)
    edge = _LABEL + plan.gpu.memory * scale
    rows, bars = 26, []
    for number, rank in enumerate(plan.memory):
        x, y = float(_LABEL), number * rows
        bars.append(f'<text x="0" y="{y + 15}">rank {rank.pipeline_rank}</text>')
        for kind, size in rank.kinds.items():
            colour = COLOURS[kinds.index(kind) % len(COLOURS)]
            label = f"{kind}: {size / GIB:.2f} GiB"
            bars.append(bar(x, y, size * scale, rows - 6, colour, label))
            x += size * scale
        x = edge if edge - 65 < x < edge else x  # the label must not overlap the line
        bars.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{rank.total / GIB:.1f} GiB</text>')
    height = len(plan.memory) * rows
    bars.append(
        f'<path d="M{edge:.1f} 0V{height + 6}" stroke="#b3564d" stroke-width="2" stroke-dasharray="5 3"/>'
    )
    capacity = f"{plan.gpu.memory / GIB:.1f} GiB of a GPU"
    bars.append(f'<text x="{edge:.1f}" y="{height + 20}" text-anchor="end">{capacity}</text>')
    return svg(bars, height + 26) + key({kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)})


def _time(plan: Plan) -> str:
    rows, x, bars, colours = time_rows(plan), 0.0, [], {}
    for number, (name, seconds) in enumerate(rows.items()):
        width = seconds / plan.time.seconds * WIDTH
        colours[f"{name} {seconds:.2f} s"] = COLOURS[number]
        bars.append(bar(x, 0, width, 24, COLOURS[number], f"{name}: {seconds:.2f} s"))
        x += width
    return svg(bars, 26) + key(colours)


def _timeline(plan: Plan) -> str:
    timeline, virtual = plan.time.timeline, plan.config.parallel.virtual_pipeline
    scale, row = (WIDTH - _LABEL) / timeline.seconds, 22
    groups: dict[tuple[int, str, int], list[Event]] = {}
    for event in timeline.events:
        groups.setdefault((event.rank, event.task.kind, event.task.chunk), []).append(event)
    shapes = [f'<text x="0" y="{rank * row + 14}">rank {rank}</text>' for rank in range(timeline.pipeline)]
    for (rank, kind, chunk), events in sorted(groups.items()):
        boxes = "".join(
            f"M{_LABEL + e.start * scale:.2f} {rank * row}h{max(0.3, (e.end - e.start) * scale * 0.97):.2f}"
            f"v{row - 5}h-{max(0.3, (e.end - e.start) * scale * 0.97):.2f}z"
            for e in events
        )
        light = 72 - 34 * chunk / max(1, virtual - 1) if virtual > 1 else 52
        hue = "210 55%" if kind == "forward" else "36 62%"
        shapes.append(
            f'<path d="{boxes}" fill="hsl({hue} {light:.0f}%)"><title>{kind}, chunk {chunk}</title></path>'
        )
    bottom = timeline.pipeline * row
    for part in range(5):
        x = _LABEL + (WIDTH - _LABEL) * part / 4
        anchor = "end" if part == 4 else "middle"
        label = f"{timeline.seconds * part / 4:.1f} s"
        shapes.append(f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="{anchor}">{label}</text>')
    return svg(shapes, bottom + 22)


def svg(shapes: list[str], height: float) -> str:
    """A drawing as wide as the page."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(shapes)}</svg>'


def bar(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    """A filled box that shows its title under the pointer."""
    box = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{colour}"'
    return f"<rect {box}><title>{html_text(title)}</title></rect>"


def key(colours: dict[str, str]) -> str:
    """A legend with names and their colours."""
    entries = (f'<li><i style="background:{c}"></i>{html_text(name)}</li>' for name, c in colours.items())
    return f'<ul class="key">{"".join(entries)}</ul>'

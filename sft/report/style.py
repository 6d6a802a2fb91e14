"""How the page of runs looks beside the common style, and what shows values at the pointer."""

STYLE = """
:root { --c0: #2f7d4a; --c1: #b4510d; --c2: #2c67b0; --c3: #8a3fa6; --c4: #8a6d00; --c5: #b3265e; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #62c184; --c1: #f0a060; --c2: #7fb2f0; --c3: #cf9be6; --c4: #d9bd4f;
    --c5: #f08cb4; }
}
.head { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; }
.head h1 { margin: 0; }
.subtitle { margin: .3rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
.pill { padding: .1rem .7rem; border: 1px solid currentColor; border-radius: 99px;
  font-size: .85rem; font-weight: 600; color: var(--soft); }
.pill.finished { color: var(--good); }
.pill.failed, .pill.killed { color: var(--alert); }
.pill.running { color: var(--c2); }
.tiles { display: grid; gap: .8rem; margin: 1.5rem 0 0; padding: 0; grid-template-columns:
  repeat(auto-fit, minmax(max(8.5rem, (100% - (var(--n) - 1) * .8rem) / var(--n)), 1fr)); }
.tiles div { padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tiles dt { font-size: .8rem; color: var(--soft); }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .8rem; line-height: 1.3; }
.notice { margin: 1.5rem 0 0; padding: .8rem 1.1rem; background: var(--warm);
  border-left: 3px solid var(--alert); border-radius: 0 8px 8px 0; overflow-wrap: anywhere; }
.notice p { margin: 0; white-space: pre-wrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1.8rem 2.4rem; }
.chart { margin: 0; min-width: 0; }
.first .chart:first-child { grid-column: 1 / -1; }
.first .chart:first-child .plot { height: 17rem; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1.2rem; align-items: baseline; }
figcaption h3 { margin: 0; }
.keys { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0; padding: 0; list-style: none;
  font-size: .82rem; color: var(--soft); }
.keys svg { width: 28px; height: 8px; margin-right: .35rem; vertical-align: middle; }
.plot { position: relative; height: 11rem; margin: .7rem 0 1.5rem 2.9rem; }
.plot > svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot line, .plot polyline, .plot path, .keys path { fill: none;
  vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--line); }
.plot .mark { stroke: var(--alert); stroke-dasharray: 2 3; }
polyline, .keys path { stroke-width: 1.8; stroke-linejoin: round; stroke: var(--c); }
.dots { stroke: var(--c); stroke-width: 6; stroke-linecap: round; }
.band { fill: var(--c); opacity: .2; }
.area { fill: var(--c); stroke: var(--card); vector-effect: non-scaling-stroke; }
.edge { stroke: none; }
.keys .marked { stroke: var(--alert); stroke-dasharray: 2 3; }
.stack .keys path { stroke-width: 8; stroke-dasharray: none; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 3; }
.d3 { stroke-dasharray: 10 3 2 3; } .d4 { stroke-dasharray: 4 2; }
.labels span { position: absolute; font-size: .75rem; line-height: 1; color: var(--soft);
  white-space: nowrap; }
.labels .y { right: calc(100% + .5rem); transform: translateY(-50%); }
.labels .x { top: calc(100% + .45rem); transform: translateX(-50%); }
.labels .end { margin-left: .35rem; transform: translateY(-50%); font-weight: 700;
  color: var(--c); }
.ends .plot { margin-right: 1.2rem; }
output { position: absolute; top: .2rem; right: .2rem; padding: .1rem .5rem; font-size: .78rem;
  font-variant-numeric: tabular-nums; white-space: pre; background: var(--card);
  border: 1px solid var(--line); border-radius: 5px; pointer-events: none; }
output:empty { display: none; }
details { font-size: .85rem; }
summary { color: var(--soft); cursor: pointer; }
table.text td, table.text th { text-align: left; }
td, th { white-space: nowrap; }
table.text td { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
table.events td:not(:last-child) { white-space: nowrap; }
table pre { font-size: .8rem; line-height: 1.5; }
.columns { display: grid; gap: 1.6rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.columns > * { min-width: 0; }
.columns + .columns { margin-top: 1.6rem; }
.parts { display: flex; flex-wrap: wrap; gap: 1.5rem; margin-top: 1.5rem; }
.parts > .card { flex: 1 1 100%; min-width: 0; margin: 0; }
.parts > .half { flex: 1 1 26rem; }
td.note { text-align: left; }
.key { display: inline-block; min-width: 4.4rem; }
.key svg { width: 28px; height: 8px; margin-right: .35rem; vertical-align: middle; }
.key path { fill: none; stroke: var(--c); stroke-width: 1.8; }
footer { margin-top: 1.5rem; }
.sample { padding: 1rem 0; border-top: 1px solid var(--line); }
.sample:first-of-type { padding-top: 0; border-top: 0; }
.sample dl { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .3rem 1rem;
  margin: 0; }
code { overflow-wrap: anywhere; font-size: .8rem; }
.card > .scroll + .scroll, .card > .scroll + h3 { margin-top: 1rem; }
.sample dt { color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; }
.sample dd { margin: 0; }
.sample pre { font-size: .85rem; line-height: 1.55; }
.best { font-weight: 650; color: var(--good); }
.command { padding: .8rem 1rem; background: var(--page); border-radius: 6px; font-size: .85rem; }
@media (max-width: 40rem) {
  .sample dl { grid-template-columns: minmax(0, 1fr); gap: .1rem; }
  .first .chart:first-child .plot { height: 12rem; }
  .plot { margin-left: 2.5rem; }
  th[scope=row] { white-space: normal; min-width: 8rem; }
  /* The last cell of a row gets a line of its own. */
  .stacks, .stacks tbody { display: block; }
  .stacks tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .4rem 0;
    border-bottom: 1px solid var(--line); }
  table.stacks th, table.stacks td { min-width: 0; padding: 0; border: 0; }
  .stacks tr > :last-child { flex-basis: 100%; }
}
@media print {
  :root { --c0: #2f7d4a; --c1: #b4510d; --c2: #2c67b0; --c3: #8a3fa6; --c4: #8a6d00;
    --c5: #b3265e; }
  details, output { display: none; }
  .charts { grid-template-columns: 1fr 1fr; gap: 1rem 1.6rem; }
  .plot { height: 8.5rem; }
  .tiles { grid-template-columns: repeat(var(--n), 1fr); gap: .4rem; }
  .tiles div { padding: .4rem .5rem; }
  .tiles dd { font-size: 1rem; }
}
"""

# The polylines hold the values, in thousandths of the axes.
SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg"), out = plot.querySelector("output");
  const [left, right, low, high, log] = svg.dataset.axes.split(",").map(Number);
  const found = {};
  for (const line of svg.querySelectorAll("polyline"))
    (found[line.dataset.name] ||= []).push(...line.getAttribute("points").split(" ")
      .map(point => point.split(",").map(Number)));
  plot.onpointermove = event => {
    const box = svg.getBoundingClientRect(), at = 1000 * (event.clientX - box.left) / box.width;
    let step = 0;
    const said = Object.entries(found).map(([name, points]) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      step = left + near[0] / 1000 * (right - left);
      const value = high - near[1] / 1000 * (high - low);
      return name + "  " + +(log ? 10 ** value : value).toPrecision(4);
    });
    out.textContent = [svg.dataset.over + " " + +step.toPrecision(6), ...said].join("\\n");
  };
  plot.onpointerleave = () => out.textContent = "";
}
"""

"""The looks of a report's page, light and dark, and the few lines of script that sort its tables."""

from __future__ import annotations

from effcli.reports import svg

CSS = """
:root { color-scheme: light dark;
  --paper: #fcfcfa; --ink: #1d2025; --faint: #666b73; --line: #e4e4df; --wash: #f3f3ef;
  --accent: #2f6fb3; --bad: #b4531a;
  --c0: #2f6fb3; --c1: #d9722e; --c2: #2b9273; --c3: #b3478f;
  --c4: #7a63c9; --c5: #a88400; --c6: #2299b5; --c7: #c4414d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --ink: #e6e6e3; --faint: #979ba3; --line: #2c3036; --wash: #1d2024;
  --accent: #74aef0; --bad: #f0a267;
  --c0: #74aef0; --c1: #f49a5e; --c2: #58c9a5; --c3: #e58bc6;
  --c4: #b3a0f5; --c5: #d9b945; --c6: #62cbe3; --c7: #f48791; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 620; letter-spacing: -0.015em; margin: 4px 0 6px;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; font-weight: 620; letter-spacing: -0.01em; margin: 56px 0 12px; }
h3 { font-size: 14px; font-weight: 600; margin: 28px 0 8px; }
h3 small, summary small { font-weight: 400; color: var(--faint); margin-left: 6px; }
small { font-size: 12.5px; }
p { margin: 0 0 8px; }
.maker { color: var(--accent); font-weight: 600; font-size: 13px; margin: 0; }
.lead, .verified { color: var(--faint); overflow-wrap: anywhere; }
.verified::before { content: "\\2713\\a0"; color: var(--c2); font-weight: 700; }
.path, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
.bad { color: var(--bad); }
.none { color: var(--faint); }
.scroll { overflow-x: auto; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 1px; margin: 28px 0 0;
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tiles > div { padding: 14px 18px 12px; box-shadow: 0 0 0 1px var(--line); }
.tiles dt { color: var(--faint); font-size: 13px; }
.tiles dd { margin: 0; font-size: 13px; font-variant-numeric: tabular-nums; }
.tiles dd:not(.bad) { color: var(--faint); }
.tiles dt + dd:not(.bad) { font-size: 25px; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em;
  color: var(--ink); white-space: nowrap; }
.tiles dd small { font-weight: 400; letter-spacing: 0; color: var(--faint); }
.tiles:has(> :nth-child(6)) > div { padding-left: 14px; padding-right: 14px; }
.tiles:has(> :nth-child(6)) dt + dd:not(.bad) { font-size: 21px; }
.tiles:has(> :nth-child(7)) { grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); }

table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 8px 12px; border-bottom: 1px solid var(--line);
  font-weight: 400; }
th:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); font-size: 13px; vertical-align: bottom; white-space: nowrap; }
thead small { display: block; }
.number { text-align: right; white-space: nowrap; }
.stages { width: auto; min-width: min(100%, 560px); }
.stages tbody th { font-weight: 600; }
.stages td small { display: block; }
.stages td small:not(.bad) { color: var(--faint); }
td.kernel { font-size: 13px; min-width: 150px; overflow-wrap: anywhere; color: var(--faint); }
.bar { display: block; height: 2px; margin: 4px 0 0 auto; background: var(--accent); border-radius: 1px; opacity: .75; }
.notes { color: var(--faint); font-size: 13px; list-style: none; padding: 0; margin: 10px 0 0; }

.remarks { list-style: none; padding: 0; margin: 0; }
.remarks li { border-left: 3px solid var(--bad); padding: 4px 0 4px 14px; margin-bottom: 8px; overflow-wrap: anywhere; }
.remarks b { font-weight: 600; margin-right: 6px; }
.pass { border-top: 1px solid var(--line); margin-top: 56px; }
.pass > h2 { margin-top: 28px; }
.options { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; padding: 0; margin: 0 0 12px; }
.options li { background: var(--wash); border-radius: 6px; padding: 2px 9px; font-size: 13px; color: var(--faint);
  overflow-wrap: anywhere; }
.options b { font-weight: 500; color: var(--ink); }

.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--faint); margin: 18px 0 0; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 6px;
  background: currentColor; }
.legend i.before, .legend i.after { border-radius: 2px; }
:not(svg) > svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 12px; font-variant-numeric: tabular-nums; }
.plots svg { min-width: 640px; }
.grid { stroke: var(--line); }
.axis { stroke: var(--faint); stroke-opacity: .5; }
.trend { fill: none; stroke: currentColor; stroke-opacity: .28; stroke-width: 1.2; }
.mark { fill: currentColor; stroke: var(--paper); stroke-width: 1; }
.mark:hover { stroke: var(--ink); stroke-width: 2; }
.mark.kept { fill: var(--paper); stroke: currentColor; stroke-width: 1.5; }
.loss { fill: none; stroke: currentColor; stroke-width: 1.5; }
.curve { max-width: 560px; margin-top: 10px; }
.sx { color: var(--faint); }
SERIES
.histograms { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 24px 28px;
  margin-top: 14px; }
figure { margin: 0; max-width: 320px; }
figcaption { font-size: 13px; color: var(--faint); margin-top: 2px; }
.before { fill: var(--faint); color: var(--faint); opacity: .55; }
.after { fill: var(--accent); color: var(--accent); }

.matrices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px 32px;
  margin-top: 14px; }
.matrices figure { max-width: 560px; }
.matrices figcaption { text-align: center; }
.field { fill: var(--wash); }
.right { fill: var(--accent); color: var(--accent); }
.wrong { fill: var(--bad); color: var(--bad); }
.clipped { fill: var(--bad); color: var(--bad); }
.limit { stroke: var(--ink); }
.legend i.clipped, .legend i.right, .legend i.wrong, .legend i.macs, .legend i.bytes { border-radius: 2px; }
svg text.count { font-size: 11px; fill: var(--ink); }
svg text.light { fill: var(--paper); }
.macs { fill: var(--c0); color: var(--c0); }
.bytes { fill: var(--c1); color: var(--c1); }
g:hover > .macs, g:hover > .bytes { fill-opacity: .75; }
.mark.from { fill: var(--paper); stroke: currentColor; stroke-width: 1.5; }
svg .bad { color: var(--bad); }
line.way { stroke: currentColor; stroke-width: 2; }
.classes svg { width: 180px; margin: 2px 0 0 12px; }
.classes thead .way { padding-left: 24px; }
figcaption b { font-weight: 500; color: var(--ink); }
figcaption small { display: block; }

details { margin-top: 28px; }
summary { cursor: pointer; font-size: 14px; font-weight: 600; }
.ledger { font-size: 13px; margin-top: 8px; }
.ledger th, .ledger td { padding-top: 5px; padding-bottom: 5px; }
.ledger th, .ledger td { white-space: nowrap; }
.ledger small { display: block; color: var(--faint); white-space: normal; }
.ledger .compressed { color: var(--faint); }
.ledger .kept { color: var(--bad); }
.ledger .bar { margin-top: 2px; }
.ledger:has(th:nth-child(11)) :is(th, td):not(:last-child) { padding-right: 8px; }
.ledger:has(th:nth-child(11)) :is(th, td):not(:first-child) { padding-left: 8px; }
.sorts { cursor: pointer; }
.sorts:hover, .sorts:focus-visible { color: var(--ink); }
[aria-sort=ascending]::after { content: "\\a0\\2191"; }
[aria-sort=descending]::after { content: "\\a0\\2193"; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, auto)); gap: 10px 24px; margin: 0; }
.facts dt { color: var(--faint); font-size: 13px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--wash); border-radius: 8px; padding: 14px 18px; overflow-x: auto; margin: 0; line-height: 1.55; }
@media print { main { padding: 0; max-width: none; } .scroll { overflow: visible; } }
""".replace(
    "SERIES",
    # Pointing at a series in the legend fades the others.
    "\n".join(
        f".s{k} {{ color: var(--c{k}); }}\n.plots:has(.k{k}:hover) :is(.mark, .trend):not(.s{k}) {{ opacity: .12; }}"
        for k in range(svg.SERIES)
    ),
)

SORT = """
for (const table of document.querySelectorAll("table.ledger")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, at) => {
    const cell = row.cells[at];
    return "v" in cell.dataset ? +cell.dataset.v : cell.textContent;
  };
  heads.forEach((head, at) => {
    const sort = () => {
      const down = head.ariaSort !== "descending";
      const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true});
      const rows = [...body.rows].sort((a, b) => order(key(a, at), key(b, at)) * (down ? -1 : 1));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.ariaSort = down ? "descending" : "ascending";
      body.append(...rows);
    };
    head.classList.add("sorts"); head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""

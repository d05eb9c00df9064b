"""How the page of a profile looks: one style sheet, for screens of any width, dark ones, and paper.

Colours of stages have a luminance of 0.2 to 0.3, so that they stand out from both backgrounds and carry dark letters.
"""

from tools.profiling.record import StageName

COLOURS: dict[StageName, str] = {
    "read": "#2f9bd6",
    "decode": "#00a3a3",
    "copy": "#8a94a6",
    "views": "#d9742f",
    "teacher": "#9b7fe0",
    "student": "#5b8def",
    "loss": "#e0679b",
    "backward": "#3aa568",
    "all-reduce": "#bd8310",
    "optimizer": "#d9705f",
    "ema": "#8f9a2b",
    "queue": "#b87fae",
}
OTHER = "var(--soft)"
WIDTHS = {"phone": 306, "half": 506, "whole": 1082}  # px of a plot inside its card

STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #ffffff; --ink: #16191d; --soft: #5a6472; --line: #d9dde3;
  --accent: #0b62c4; --warn: #8a4b00; --code: #eef1f5; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #181c22; --ink: #e9ecf0; --soft: #a3adba;
  --line: #333a44; --accent: #7ab5ff; --warn: #f2b866; --code: #232932; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 24px 40px; display: grid; gap: 16px;
  grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
header, section { grid-column: 1 / -1; min-width: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 24px; }
section.half { grid-column: span 1; }
section.brief { align-self: start; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 2px; }
p { margin: 0 0 8px; }
header p, .soft { color: var(--soft); font-size: .875rem; margin: 2px 0 0; overflow-wrap: anywhere; }
.warn { color: var(--warn); font-weight: 600; }
.verdict { border-left: 6px solid var(--accent); }
.verdict h2 { color: var(--accent); font-size: .875rem; }
.verdict p { font-size: 1.2rem; font-weight: 600; line-height: 1.35; margin: 4px 0 0; }
ol { list-style: none; margin: 14px 0 0; padding: 0; display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
ol li { border-top: 1px solid var(--line); padding-top: 10px; font-size: .875rem; display: grid; gap: 4px;
  align-content: start; min-width: 0; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .8125rem;
  overflow-wrap: anywhere; }
ol code { background: var(--code); padding: 5px 8px; border-radius: 6px; font-weight: 600; }
.gain { color: var(--soft); }
.tiles { display: grid; gap: 16px; margin: 0; grid-column: 1 / -1;
  grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tiles dt { color: var(--soft); font-size: .8125rem; }
.tiles dd { margin: 0; }
.tiles dd.big { font-size: 1.75rem; font-weight: 650; letter-spacing: -.01em; line-height: 1.25; }
.tiles dd.small { color: var(--soft); font-size: .8125rem; }
svg { display: block; width: 100%; height: auto; margin: 8px auto 0; }
svg.phone { display: none; max-width: 460px; }
svg text { font-size: 12px; fill: var(--ink); font-family: inherit; }
svg .soft { fill: var(--soft); margin: 0; font-size: 12px; }
svg .inside { fill: #0c0e11; }
svg .inverse { fill: var(--card); }
svg .roof { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .leader { stroke: var(--soft); stroke-width: 1; }
svg .spot { stroke: var(--card); stroke-width: 1; }
svg .mark { stroke: var(--ink); stroke-width: 1.25; }
svg .need { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .warm { fill: var(--warn); }
svg .ideal { stroke: var(--soft); stroke-width: 1.25; stroke-dasharray: 2 4; fill: none; }
svg .curve { stroke: var(--accent); stroke-width: 2; fill: none; }
svg .dot { fill: var(--accent); }
svg .lane { fill: var(--code); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0 0; padding: 0; list-style: none;
  font-size: .8125rem; }
.legend span { white-space: nowrap; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.scroll { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 0 4px 16px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody th[colspan] { color: var(--soft); font-size: .75rem; padding-top: 10px; }
table.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.pairs th { vertical-align: top; width: 11rem; }
details { margin-top: 10px; font-size: .875rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--code); padding: 12px; border-radius: 6px; font-size: .75rem;
  margin: 8px 0 0; }
@media (max-width: 900px) { section.half { grid-column: 1 / -1; } svg.half { max-width: 620px; }
  svg.whole text { font-size: 15px; } }
@media (max-width: 600px) { main { padding: 12px; gap: 12px; } section { padding: 14px; }
  table.pairs th { width: 7rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; } .tiles div { padding: 10px 12px; }
  .tiles div:first-child { grid-column: 1 / -1; } .tiles dd.big { font-size: 1.5rem; }
  svg.phone { display: block; } svg.half, svg.whole { display: none; } .verdict p { font-size: 1.0625rem; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --accent: #0b4f9e; --warn: #7a4200; --code: #f2f2f2; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } main { padding: 0; gap: 10px; }
  section, .tiles div { break-inside: avoid; } section:has(details[open]) { break-inside: auto; }
  svg.half { max-width: 470px; } svg.whole text { font-size: 17px; }
  .scroll { overflow: visible; } th, td { padding-left: 8px; white-space: normal; } pre { white-space: pre-wrap; } }
"""

"""The style sheet of the page."""

CSS = """
:root { color-scheme: light; --ink: #1f2328; --muted: #59636e; --rule: #d8dee4; --wash: #f6f8fa; --link: #0b57c2 }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 24px }
header { padding-top: 36px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere }
h2 { font-size: 21px; margin: 48px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere }
h3 { font-size: 16px; margin: 0 0 6px }
h4 { font-size: 14px; margin: 0 0 6px; display: flex; gap: 8px; justify-content: space-between; flex-wrap: wrap }
.kicker { margin: 0 0 4px; font-size: 13px; letter-spacing: .06em; text-transform: uppercase; color: var(--muted) }
.facts { margin: 0 0 16px; color: var(--muted); font-size: 14px; overflow-wrap: anywhere }
.facts span { margin-right: 20px } .facts b { font-weight: 600; color: var(--ink) }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
#summary h2 { border: 0; margin: 0; padding: 0; height: 1px; width: 1px; overflow: hidden; position: absolute }
.lead { font-size: 20px; line-height: 1.45; margin: 28px 0 20px; max-width: 52em }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; margin: 20px 0 }
.tile { background: var(--wash); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 16px }
.tile dt { font-size: 13px; color: var(--muted) }
.tile dd { margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums }
.tile dd.note { font-size: 13px; font-weight: 400 }
.note, small { color: var(--muted); font-size: 13px } p.note { margin: 8px 0 }
table { border-collapse: collapse; font-size: 15px }
.numbers { font-variant-numeric: tabular-nums }
.numbers td, .numbers thead th { text-align: right; padding: 6px 0 6px 36px; white-space: nowrap }
.numbers th:first-child { text-align: left; font-weight: 400; padding: 6px 0 }
.numbers thead th { font-weight: 600; color: var(--muted); font-size: 13px }
.numbers tr { border-bottom: 1px solid var(--rule) }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 22px 28px }
.panels.large { grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 14px 28px }
figure { margin: 0; min-width: 0 } figure.wide { margin-bottom: 28px } figure.half { max-width: 560px }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-size: 14px;
  align-items: baseline }
figcaption b { font-weight: 600; overflow-wrap: anywhere }
.latest { color: var(--muted); font-size: 13px; font-weight: 400; font-variant-numeric: tabular-nums }
.keys { display: flex; flex-wrap: wrap; gap: 0 16px }
.keys i { display: inline-block; width: 20px; margin-right: 6px; text-align: center; font-style: normal;
  vertical-align: middle }
svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round; stroke-linecap: butt }
svg text { font-family: inherit !important }
.ramp { font-size: 13px; color: var(--muted); white-space: nowrap }
.ramp i { display: inline-block; width: 16px; height: 10px }
details { margin: 14px 0 } summary { cursor: pointer; color: var(--link); font-size: 14px; margin-bottom: 8px }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
.selector { position: sticky; top: 0; z-index: 1; background: #fff; padding: 10px 0;
  border-bottom: 1px solid var(--rule); display: flex; flex-wrap: wrap; gap: 8px 28px;
  align-items: center; justify-content: space-between; font-size: 14px }
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px }
legend { float: left; padding: 0 16px 0 0; color: var(--muted) }
label { cursor: pointer } input { margin: 0 6px 0 0; accent-color: var(--link) }
.legend { display: none; font-variant-numeric: tabular-nums; font-size: 13px }
.legend .t { min-width: 68px; text-align: center; padding: 2px 8px; border-radius: 0 }
article { border: 1px solid var(--rule); border-radius: 8px; padding: 16px 20px 8px; margin: 16px 0 }
.text { font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.prompt { background: var(--wash); border-radius: 6px; padding: 8px 12px; margin-bottom: 14px }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px }
.completion { min-width: 0 }
.completion details { margin: 10px 0; max-height: 420px; overflow: auto }
.completion .numbers { font-size: 13px }
.completion .numbers td, .completion .numbers thead th + th { padding: 2px 0 2px 20px }
.completion .numbers th.text { font-size: 13px; padding: 2px 0; line-height: 1.4 }
.t { border-radius: 3px; padding: 1px 0; border-left: 1px solid #fff; background:
  linear-gradient(rgb(84 157 235 / max(0, var(--x))), rgb(84 157 235 / max(0, var(--x)))),
  linear-gradient(rgb(240 146 72 / max(0, 0 - var(--x))), rgb(240 146 72 / max(0, 0 - var(--x)))) }
.completion .t:hover { outline: 1.5px solid var(--ink) }
pre { background: var(--wash); border-radius: 6px; padding: 10px 14px; overflow: auto; font-size: 13px; margin: 6px 0 }
.settings th, .settings td { text-align: left; vertical-align: top; padding: 3px 28px 3px 0; font-size: 13px;
  font-weight: 400; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere }
.settings th { color: var(--muted) }
.definitions { display: grid; grid-template-columns: minmax(190px, max-content) 1fr; gap: 4px 28px; font-size: 14px }
.definitions dd { margin: 0; color: var(--muted) }
@media (max-width: 720px) { .pair, .definitions { grid-template-columns: minmax(0, 1fr) }
  .numbers td, .numbers thead th { padding-left: 10px; font-size: 13px } #evaluation { overflow-x: auto }
  #evaluation th { font-size: 13px } main, header { padding-inline: 14px } }
@media print { .selector { position: static } article, figure { break-inside: avoid } }
"""

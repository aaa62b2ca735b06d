"""How the page looks: light and dark, narrow and wide, on paper."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root { color-scheme: light dark; --ink: #1b2330; --soft: #5b6675; --page: #f5f6f8; --card: #ffffff; --line: #dfe3e9;
  --accent: #2463c9; --good: #18794e; --bad: #b42318; --note: #fff6e0; --note-line: #e2b64a; --stripe: #f7f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf1; --soft: #a3aebd; --page: #11151b; --card: #1a2029;
  --line: #303947; --accent: #7fb0ff; --good: #58c792; --bad: #ff8a7a; --note: #2c2614; --note-line: #97782a;
  --stripe: #1f2630; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
.eyebrow { color: var(--accent); font-weight: 600; font-size: .85rem; letter-spacing: .04em; margin: 0; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.2; margin: .25rem 0 1rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 0 0 .5rem; letter-spacing: -.01em; }
p { margin: .5rem 0 1rem; max-width: 46rem; }
.lead { font-size: 1.1rem; }
.soft, figcaption, .foot { color: var(--soft); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.5rem;
  margin: 1.25rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; margin: 1.75rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1rem 1.15rem; }
.card .name { color: var(--soft); font-size: .85rem; margin: 0; }
.card .big { font-size: 1.8rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.3; margin: .1rem 0; }
.card .under { font-size: .85rem; margin: 0; color: var(--soft); line-height: 1.45; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .4rem .65rem; border-bottom: 1px solid var(--line); vertical-align: baseline; }
thead th { color: var(--soft); font-weight: 600; font-size: .82rem; line-height: 1.3; vertical-align: bottom;
  border-bottom-width: 2px; }
thead th.figure { white-space: normal; }
tbody th { font-weight: 550; min-width: 5rem; }
tbody tr:nth-child(even) { background: var(--stripe); }
.word { text-align: left; } .figure { text-align: right; white-space: nowrap; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.note { background: var(--note); border-left: 4px solid var(--note-line); border-radius: 6px; padding: .6rem .9rem;
  margin: .75rem 0; max-width: none; }
.note.bad { border-color: var(--bad); }
figure { margin: 1.25rem 0; } figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: .35rem; max-width: 46rem; }
blockquote { margin: 1rem 0; padding: .25rem 0 .25rem 1.1rem; border-left: 4px solid var(--accent); font-size: 1.15rem;
  overflow-wrap: anywhere; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--stripe);
  border: 1px solid var(--line); border-radius: 5px; padding: .05em .35em; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 1rem 0; font-size: .92rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--accent); font-weight: 550; }
.track { background: var(--line); border-radius: 4px; min-width: 9rem; height: .55rem; overflow: hidden; }
.track span { display: block; height: 100%; background: var(--accent); }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; max-width: 46rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 40rem) { main { padding-top: 1.5rem; } section { padding: 1rem; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: .5rem; } }
@media print { body { background: none; } section, .card { break-inside: avoid; } }
"""

"""Style and script of the page: nothing is loaded from anywhere."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --soft: #63636e; --line: #d4d4dc; --wash: #f5f5f8;
  --bad: #b3261e; --warn: #7a5300; --light: 90%; --lighter: 82%; --edge: 30%; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e7ec; --paper: #16161a; --soft: #a2a2ae; --line: #3a3a44;
  --wash: #1f1f25; --bad: #ffb4ab; --warn: #f2c063; --light: 20%; --lighter: 27%; --edge: 62%; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
.note { color: var(--warn); } .refused { color: var(--bad); font-weight: 600; }
.text { white-space: pre-wrap; font: 14px/1.9 ui-monospace, monospace; padding: .75rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--wash); }
.text:focus-visible, a:focus-visible { outline: 3px solid hsl(215 80% 55%); outline-offset: 2px; }
.t { border-radius: 2px; color: var(--soft); }
.t:nth-of-type(even) { background: color-mix(in srgb, var(--line) 40%, transparent); }
.s { font-weight: 600; } .t:hover, .now { outline: 2px solid var(--ink); }
.turn { border-left: 3px solid hsl(var(--h) 70% var(--edge)); padding: .1rem 0; scroll-margin-top: 3rem; }
.turn .t { color: var(--ink); background: hsl(var(--h) 60% var(--light)); }
.turn .t:nth-of-type(even) { background: hsl(var(--h) 60% var(--lighter)); }
.turn .e { background: hsl(var(--h) 70% var(--edge)) !important; color: var(--paper); font-weight: 600; }
.off .t { background: none !important; color: var(--soft); text-decoration: line-through; }
.tag { font: 600 .7rem system-ui, sans-serif; padding: 0 .25rem; color: hsl(var(--h) 70% var(--edge)); }
.u { opacity: .7; } .cut { color: var(--warn); font: 600 .8rem system-ui, sans-serif; display: block; }
.tail { color: var(--soft); margin: .2rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:last-child, td:last-child { text-align: left; } .chosen { font-weight: 700; }
th a { color: inherit; border-left: .5rem solid hsl(var(--h) 70% var(--edge)); padding-left: .4rem; }
.key { padding: 0; list-style: none; font-size: .9rem; } .key li > span { margin-right: .4rem; }
#token { position: fixed; inset: auto 0 0 0; padding: .6rem 1rem; background: var(--ink); color: var(--paper);
  font: 14px/1.4 ui-monospace, monospace; } #token:empty { display: none; }
@media (max-width: 40rem) { body { padding: .5rem .5rem 5rem; } dl { grid-template-columns: 1fr; }
  dt { margin-top: .4rem; } }
"""

SCRIPT = """
const bar = document.getElementById('token');
let now = null;
function show(token) {
  if (now) now.classList.remove('now');
  now = token;
  now.classList.add('now');
  bar.textContent = now.title;
  now.scrollIntoView({block: 'nearest'});
}
for (const text of document.querySelectorAll('.text')) {
  let tokens = null, firsts = null, at = -1;
  const all = () => {
    if (tokens) return;
    tokens = Array.from(text.querySelectorAll('.t'));
    firsts = Array.from(text.querySelectorAll('.turn .t:first-of-type')).map(token => tokens.indexOf(token));
  };
  text.addEventListener('keydown', event => {
    all();
    const next = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1,
      ArrowDown: firsts.find(place => place > at), ArrowUp: firsts.findLast(place => place < at)}[event.key];
    if (next === undefined || event.ctrlKey || event.metaKey || event.altKey || !tokens[next]) return;
    event.preventDefault();
    show(tokens[at = next]);
  });
  text.addEventListener('click', event => {
    const token = event.target.closest('.t');
    if (!token) return;
    all();
    at = tokens.indexOf(token);
    show(token);
  });
}
"""

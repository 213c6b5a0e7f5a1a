"""A page of the site without Quarto: nbdev's processed notebook through pandoc, measured in Chromium.

It has the site's own styles.css on a plain base, so it shows what is too wide or what pandoc changes, not how Quarto's themes look.
`python tests/render.py PROCESSED OUT` writes HTML of all processed notebooks of a folder, and prints their heights."""
import json, re, shutil, subprocess, sys
from html import escape
from pathlib import Path
from typing import NamedTuple
import yaml
from fastcore.nbio import read_nb

BASE = """*{box-sizing:border-box} body{margin:0;font:17px/1.5 system-ui,sans-serif} main{padding:0 12px;max-width:800px;margin:auto}
code{font-size:.875em} pre{font-size:.875em;padding:.4em;background:#80808020} table{width:100%;border-collapse:collapse}
th,td{padding:.5rem;border-bottom:1px solid #8884} h1{font-size:2rem} h3{font-size:1.4rem} figure{margin:1em 0}
a{color:#1f64a0}
body.quarto-dark{background:#171b20;color:#d6dce3} body.quarto-dark a{color:#7fb6e8} td,th,select,input,button{font:inherit}"""

FENCE = '`'*8 # more than printed text has

def pandoc():
    "The command pandoc, or None"
    try: import pypandoc
    except ImportError: return shutil.which('pandoc')
    return pypandoc.get_pandoc_path()

def chromium(): return next((f for o in ('chromium','chromium-browser','google-chrome') if (f := shutil.which(o))), None)

def joined(x): return x if isinstance(x, str) else ''.join(x)
def raw(html): return f'{FENCE}{{=html}}\n{html}\n{FENCE}'
def option(cell, name):
    m = re.search(rf'^#\|\s*{name}:\s*(.+)$', cell.source, re.M)
    return m and m[1].strip().strip('"')

def output(o, alt=''):
    "Markdown of one output; an image has the words of its cell"
    if o['output_type']=='stream': return raw(f'<div class="cell-output"><pre>{escape(joined(o["text"]))}</pre></div>')
    data = {k: joined(v) for k,v in o.get('data', {}).items() if isinstance(v, (str,list))}
    if 'text/markdown' in data: return data['text/markdown']
    kind = next((k for k in ('text/html','image/svg+xml') if k in data), None)
    image = next((k for k in data if k.startswith('image/')), None)
    if kind: inside = data[kind]
    elif image:
        width = o.get('metadata', {}).get(image, {}).get('width')
        size = f' width="{width}"' if width else ''
        inside = f'<img alt="{escape(alt)}"{size} src="data:{image};base64,{data[image].strip()}">'
    else: inside = f'<pre>{escape(data.get("text/plain", ""))}</pre>'
    return raw(f'<div class="cell-output cell-output-display">{inside}</div>')

def code(cell):
    "Markdown of a code cell and its outputs"
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    res = [f'````python\n{source}\n````'] if source and option(cell, 'echo')!='false' else []
    if res and option(cell, 'code-fold')=='true':
        summary = option(cell, 'code-summary') or 'Code'
        res = [f'<details class="code-fold"><summary>{summary}</summary>', *res, '</details>']
    alt = option(cell, 'fig-alt') or ''
    shown = [output(o, alt) for o in cell.get('outputs', [])]
    classes = option(cell, 'classes')
    if classes: shown = [raw(f'<div class="cell {" ".join(yaml.safe_load(classes))}">'), *shown, raw('</div>')]
    return res + shown

def as_markdown(nb):
    "A processed notebook as one text"
    res = []
    for cell in nb.cells:
        title = re.search(r'^title: (.*)$', cell.source, re.M) if cell.cell_type=='raw' else None
        if title: res.append(f'# {yaml.safe_load(title[1])}')
        elif cell.cell_type=='markdown': res.append(cell.source)
        elif cell.cell_type=='code' and option(cell, 'include')!='false': res += code(cell)
    return '\n\n'.join(res)

NEXT = '<!-- next page -->'

def bodies(texts):
    "HTML of each text, from one process of pandoc; starting it takes longer than a page"
    cmd = [pandoc(), '-f', 'markdown-smart', '-t', 'html5', '--mathml', '--wrap=preserve']
    text = f'\n\n{raw(NEXT)}\n\n'.join(texts)
    res = subprocess.run(cmd, input=text, capture_output=True, text=True, check=True)
    return res.stdout.split(NEXT)

def page(body, css, dark=False):
    "A body with its head"
    theme = 'quarto-dark' if dark else 'quarto-light'
    return (f'<!DOCTYPE html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{BASE}{css}</style>'
            f'<body class="{theme}"><main>{body}</main></body>')

def to_html(text, css, dark=False):
    "Markdown as a page"
    return page(bodies([text])[0], css, dark)

def all_as_html(nbs, css):
    "name -> page, for name -> processed notebook"
    found = bodies([as_markdown(nb) for nb in nbs.values()])
    return {name: page(body, css) for name,body in zip(nbs, found, strict=True)}

def as_html(nb, css, dark=False): return to_html(as_markdown(nb), css, dark)

def qmd_as_html(text, css, dark=False):
    "A page that is written as Markdown with a head of its own"
    _,head,body = re.split(r'^---\n', text, maxsplit=2, flags=re.M)
    title = re.search(r'^title: (.*)$', head, re.M)[1]
    return to_html(f'# {title}\n\n{body}', css, dark)

MEASURE = """<script>addEventListener('load', () => { const d = document.documentElement
  const wide = [...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth &&
    getComputedStyle(e).overflowX=='visible').map(e => e.outerHTML.slice(0, 160)).reverse()
  parent.postMessage({page: PAGE, excess: d.scrollWidth - d.clientWidth, wide: wide.slice(0, 3), height: document.body.offsetHeight}, '*') })</script>"""
# each page is loaded twice, narrow and as on a desk: a frame that changes its width is laid out when the browser has time
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre><script>const loads = PAGES.flatMap(p => [[p, WIDTH], [p, DESK]]), found = []
  let frame; function next() { if (frame) frame.remove(); if (!loads.length) return
    frame = document.createElement('iframe'); frame.height = 800; [frame.src, frame.width] = loads.shift(); document.body.append(frame) }
  addEventListener('message', e => { if (frame.width==WIDTH) found.push(e.data); else found.at(-1).height = e.data.height
    document.getElementById('found').textContent = JSON.stringify(found); next() })
  next()</script>"""

DESK,SCREEN = 1280,800 # pixels of a window on a desk

class Measure(NamedTuple):
    excess: int    # pixels by which a page is wider than a narrow window
    wide: list     # elements that make it so
    screens: float # height in a window on a desk, in such windows

def measured(pages, folder, width=390):
    "name -> `Measure`, for name -> HTML"
    folder.mkdir(exist_ok=True)
    files = []
    for i,(name,html) in enumerate(pages.items()):
        files.append(f'{i}.html')
        (folder/files[-1]).write_text(html + MEASURE.replace('PAGE', json.dumps(name)), encoding='utf-8')
    frames = folder/'frames.html'
    frames.write_text(FRAMES.replace('PAGES', json.dumps(files)).replace('WIDTH', str(width)).replace('DESK', str(DESK)), encoding='utf-8')
    cmd = [chromium(), '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={folder}/profile', '--dump-dom',
           '--timeout=120000', f'--virtual-time-budget={2000*len(files) + 5000}', frames.resolve().as_uri()]
    dom = subprocess.run(cmd, capture_output=True, text=True, timeout=900).stdout
    import html as h
    found = json.loads(h.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
    return {o['page']: Measure(o['excess'], o['wide'], o['height']/SCREEN) for o in found}

def main(source, out):
    css = (source/'styles.css').read_text(encoding='utf-8')
    pages = all_as_html({f.relative_to(source).as_posix(): read_nb(f) for f in sorted(source.rglob('*.ipynb'))}, css)
    for path,page in pages.items():
        file = (out/path).with_suffix('.html')
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding='utf-8')
    if not chromium(): return
    found = measured(pages, out/'measured')
    for path,m in sorted(found.items(), key=lambda o: -o[1].screens): print(f'{m.screens:5.1f} screens {path}')

if __name__=='__main__': main(*map(Path, sys.argv[1:3]))

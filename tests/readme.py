"""README.md is what index.ipynb says: its text, code and printed text, with links and images that work on GitHub.

`python tests/readme.py` writes it. nbdev-readme does the same through Quarto; this does it without."""
import re, sys
from pathlib import Path
from fastcore.nbio import read_nb
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parents[1]
NOTE = '<!-- Written from nbs/index.ipynb by `make readme`: change that, not this. -->'
SITE = 'https://deqdet.github.io/deqdet'
re_page = re.compile(r'\]\((\w+)\.qmd\)') # a page that is no notebook: on the site only
re_link = re.compile(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)')

KEPT = 'strip_ansi','hide_line','filter_stream_','rm_header_dash','rm_export','clean_magics','hide_'

def procs(): return [p for p in FilterDefaults().base_procs() if p.__name__ in KEPT]

def printed(output):
    "The text of one output; an image belongs in nbs/images, with a markdown link to it"
    if 'text' in output: return ''.join(output['text'])
    data = output['data']
    if 'image/png' in data: raise ValueError('index.ipynb holds an image as output: save it in nbs/images, link to it')
    return ''.join(data.get('text/markdown', data['text/plain']))

def as_md(cell):
    "One cell as markdown"
    if cell.cell_type=='markdown':
        lines = [l for l in cell.source.splitlines() if not l.startswith(':::')] # divisions of the site
        text = re_page.sub(rf']({SITE}/\1.html)', '\n'.join(lines))
        return re_link.sub(r'\1nbs/\2', text)
    if cell.cell_type!='code' or not cell.source.strip(): return ''
    src = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|')).strip()
    if re.search(r'^#\|\s*echo:\s*false', cell.source, re.M): src = ''
    res = [f'``` python\n{src}\n```'] if src else []
    for o in cell.outputs:
        text = printed(o).rstrip()
        indented = '\n'.join(f'    {l}'.rstrip() for l in text.splitlines())
        res.append(text if 'text/markdown' in o.get('data', {}) else indented)
    return '\n\n'.join(res)

def readme(path):
    "The text of README.md for the notebook at `path`"
    first,*rest = [as_md(c) for c in NBProcessor(nb=read_nb(path), procs=procs(), process=True).nb.cells]
    return '\n\n'.join(o.strip('\n') for o in [first, NOTE, *rest] if o.strip()) + '\n'

if __name__=='__main__':
    try: text = readme(ROOT/'nbs'/'index.ipynb')
    except ValueError as e: sys.exit(str(e))
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    print('README.md')

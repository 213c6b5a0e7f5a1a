"""Faults in the documentation's input that Quarto would pass over in silence.

The notebooks go through nbdev's own processors, all but the one that executes cells, and what comes out is read with
a markdown parser. `python tests/docs_check.py [ROOT]` prints the faults of a project, by default of this one."""
import ast, builtins, posixpath, re, sys
from collections import Counter
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
import yaml
from fastcore.nbio import dict2nb, mk_cell, read_nb
from markdown_it import MarkdownIt
from nbdev.config import nbpath2html
from nbdev.doclinks import NbdevLookup, _qual_syms, nbglob
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

KINDS = ('sidebar entry without a page', 'page without a sidebar entry', 'dead link', 'dead anchor', 'missing image',
         'no stored output', 'stored error', 'unknown symbol', 'import beside other code', 'path of a machine',
         'lost text', 'long output', 'long text', 'heavy notebook', 'image without words', 'missing file of the site', 'fetched from outside')
LINES,KB = 20,400 # an output has less, a notebook no more
WORDS = 60 # a text cell has no more, beside code, tables and formulas

class Fault(NamedTuple):
    kind: str   # one of KINDS
    where: str  # file it is in, relative to the root
    what: str   # the entry, link or name
    def __str__(self): return f'{self.where}: {self.kind}: {self.what}'

# ---- markdown

parser = MarkdownIt('commonmark').enable('table')
re_attr = re.compile(r'\s*\{([^{}]*)\}\s*$')
re_id = re.compile(r'''\bid=["']([^"']+)["']|\{[^{}\n]*#([\w.:-]+)[^{}\n]*\}''')
re_href = re.compile(r'''<a\b[^>]*\bhref=["']([^"']+)["']''')
re_img = re.compile(r'<img\b[^>]*>')
re_fetched = re.compile(r'''<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']((?:https?:)?//[^"']+)''')
re_src = re.compile(r'''<img\b[^>]*\bsrc=["']([^"']+)["']''')

def slug(text):
    "The anchor that pandoc gives a heading"
    text = re.sub(r'[^\w\s.-]', '', text.lower()).strip()
    return re.sub(r'^[^a-z\u00df-\uffff]+', '', re.sub(r'\s+', '-', text)) or 'section'

class Text:
    "What a piece of markdown holds: headings, links, images, names in backticks"
    def __init__(self, src):
        self.headings,self.ids,self.links,self.images,self.codes,self.wordless,self.fetched = [],[],[],[],[],[],[]
        tokens = parser.parse(src)
        for i,t in enumerate(tokens):
            if t.type=='heading_open': self._heading(tokens[i+1])
            if t.type=='inline': self._inline(t)
            if t.type=='html_block': self._html(t.content)

    def _heading(self, t):
        if not re_id.search(t.content): self.headings.append(re_attr.sub('', ''.join(c.content for c in t.children)))

    def _inline(self, t):
        for c in t.children:
            if c.type=='link_open': self.links.append(c.attrs['href'])
            elif c.type=='image':
                self.images.append(c.attrs['src'])
                if not c.content.strip(): self.wordless.append(c.attrs['src'])
            elif c.type=='code_inline': self.codes.append(c.content)
            elif c.type in ('html_inline','text'): self._html(c.content)

    def _html(self, s):
        self.ids += [a or b for a,b in re_id.findall(s)]
        self.links += re_href.findall(s)
        self.images += re_src.findall(s)
        self.wordless += [t[:60] for t in re_img.findall(s) if not re.search(r'''\balt=["'][^"']''', t)]
        self.fetched += re_fetched.findall(s)

# ---- pages

def light_procs(): return [p for p in FilterDefaults().base_procs() if p.__name__ not in ('exec_show_docs','add_links')]
def joined(x): return x if isinstance(x, str) else ''.join(x)
def is_export(c): return c.directives_.keys() & {'export','exports','exporti'}

class Page:
    "One page of the site, before and after nbdev's processors"
    def __init__(self, path, nbs):
        self.path = path.relative_to(nbs).as_posix()
        self.url = nbpath2html(Path(self.path)).as_posix()
        def read(): return read_nb(path) if path.suffix=='.ipynb' else dict2nb(
            cells=[mk_cell(path.read_text(encoding='utf-8'), 'markdown')], metadata={}, path_=str(path))
        self.raw = NBProcessor(nb=read()).nb
        self.nb = NBProcessor(nb=read(), procs=light_procs(), process=True).nb
        self.code = [c.source for c in self.raw.cells if c.cell_type=='code']
        self.outputs = [o for c in self.raw.cells for o in c.get('outputs', [])]
        self.attachments = {k for c in self.raw.cells for k in c.get('attachments', {})}

    @cached_property
    def texts(self): return [(c.source, Text(c.source)) for c in self.nb.cells if c.cell_type=='markdown']

    @cached_property
    def shown(self):
        "Markdown and HTML among the outputs that the page keeps"
        data = [o.get('data', {}) for c in self.nb.cells for o in c.get('outputs', [])]
        return [Text(joined(d[k])) for d in data for k in ('text/markdown','text/html') if k in d]

    @cached_property
    def anchors(self):
        "Every anchor of the page, as pandoc numbers them"
        res,seen = set(),Counter()
        def add(h):
            s = slug(h)
            res.add(f'{s}-{seen[s]}' if seen[s] else s)
            seen[s] += 1
        for c in self.nb.cells:
            t = Text(c.source) if c.cell_type=='markdown' else None
            if t: res.update(t.ids)
            heads = t.headings if t else re.findall(r'^show_doc\(\s*([\w.]+)', c.source, re.M)
            for h in heads: add(h)
            if not t: res.update(re.findall(r'^#\|\s*label:\s*(\S+)', c.source, re.M))
        for t in self.shown: res.update(t.ids)
        return res

# ---- names

class SiteLookup(NbdevLookup):
    "nbdev's own lookup of names in backticks, on the index of one package"
    def __init__(self, index):
        self.entries,self.aliases = {'lib': _qual_syms(index)},{}
        self.mods = self.entries['lib']['syms']
        full = {k:v for d in self.mods.values() for k,v in d.items()}
        self.short = {k.removeprefix(m+'.'):v for m,d in self.mods.items() for k,v in d.items()}
        self.syms = {**self.short, **full}

class Module:
    "What a module of the package defines"
    def __init__(self, path, root):
        self.name = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')
        self.src = path.read_text(encoding='utf-8')
        self.defs,self.names = set(),set()
        for t in ast.parse(self.src).body: self._add(t)

    def _add(self, t):
        if isinstance(t, (ast.FunctionDef,ast.AsyncFunctionDef,ast.ClassDef)):
            if not any('patch' in ast.unparse(d) for d in t.decorator_list): self.defs.add(t.name)
        elif isinstance(t, (ast.Import,ast.ImportFrom)):
            self.names |= {(a.asname or a.name).split('.')[0] for a in t.names}
        else: self.names |= {n.id for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

    @property
    def exported(self):
        m = re.search(r'^__all__\s*=\s*(\[.*?\])', self.src, re.M|re.S)
        return set(ast.literal_eval(m.group(1))) if m else set()

class Names:
    "What a name in backticks may mean: a symbol of the package, a word of the project's code, Python's or torch's"
    def __init__(self, lib, lookup, code):
        self.pkg,self.lookup = lib.name,lookup
        mods = [Module(p, lib.parent) for p in sorted(lib.rglob('*.py')) if p.name!='_modidx.py']
        self.mods = {m.name:m for m in mods}
        code = '\n'.join(list(code) + [m.src for m in self.mods.values()])
        self.words = set(re.findall(r'[A-Za-z_]\w*', code)) | set(dir(builtins))

    def stale(self):
        "Module name -> its exported functions and classes that the index does not know"
        def unknown(m): return sorted(n for n in m.exported & m.defs if self.lookup[f'{m.name}.{n}'] is None)
        return {k:unknown(m) for k,m in self.mods.items() if unknown(m)}

    def elsewhere(self, name):
        "Is it a name of torch, or of another library that nbdev documented?"
        import torch
        homes = torch, torch.Tensor, torch.nn, torch.nn.Module, torch.nn.functional, torch.optim, torch.autograd
        return any(hasattr(o, name) for o in homes) or any(k.endswith(f'.{name}') for k in NbdevLookup().syms)

    def qualified(self, name):
        "Does `deqdet.x.y` exist?"
        mod = max((m for m in self.mods if f'{name}.'.startswith(f'{m}.')), key=len, default='')
        if name==mod: return True
        if not mod or self.lookup[name] is not None: return bool(mod)
        head,*rest = name[len(mod)+1:].split('.')
        m = self.mods[mod]
        return head in m.defs|m.names and all(r in self.words for r in rest)

    def wrong(self, text):
        "What is wrong with the name in these backticks, if anything"
        m = re.fullmatch(r'([A-Za-z_][\w.]*[\w])(\(.*\))?', text.strip(), re.S)
        if not m: return
        name,call = m.groups()
        head,*rest = name.split('.')
        if head==self.pkg: return None if self.qualified(name) else 'there is nothing of that name in the package'
        if self.lookup[name] is not None: return
        if rest:
            ours = head in self.lookup.short
            return f'{head} has nothing of that name' if ours and not set(rest) <= self.words else None
        if name in self.words: return
        near = get_close_matches(name, self.lookup.short, 1, .85) if '_' in name or not name.islower() else []
        if not (near or call) or self.elsewhere(name): return
        return f'did you mean {near[0]}?' if near else 'a call of something that is nowhere defined'

# ---- the site

def entries(x):
    "Every page that a sidebar or navbar names"
    if isinstance(x, str): return [x]
    if isinstance(x, list): return [e for o in x for e in entries(o)]
    if isinstance(x, dict): return [e for k in ('href','file','section','contents','left','right','menu','tools')
                                    if k in x and not (k=='section' and not is_page(x[k])) for e in entries(x[k])]
    return []

def is_page(s): return isinstance(s, str) and Path(urlsplit(s).path).suffix in ('.ipynb','.qmd','.md','.html')

class Site:
    "The documentation of a project: `root` holds _quarto.yml, the notebooks and the package"
    def __init__(self, root, nbs='nbs', lib='deqdet'):
        self.root,self.nbs = Path(root),Path(root)/nbs
        self.yml = yaml.safe_load((self.root/'_quarto.yml').read_text(encoding='utf-8'))
        paths = nbglob(self.nbs, file_glob='', file_re=r'\.(?:ipynb|qmd|md)$', as_path=True)
        self.pages = {p.path:p for p in (Page(f, self.nbs) for f in paths.sorted())}
        self.urls = {p.url:p for p in self.pages.values()}
        scope = {}
        exec((self.root/lib/'_modidx.py').read_text(encoding='utf-8'), scope)
        self.lookup = SiteLookup(scope['d'])
        self.names = Names(self.root/lib, self.lookup, (c for p in self.pages.values() for c in p.code))
        s = scope['d']['settings']
        self.home = s['doc_host'] + s['doc_baseurl'] + '/'
        self.repo = [f"{s['git_url']}/{o}/{s['branch']}/" for o in ('blob','tree')]

def check_sidebar(site):
    web = site.yml['website']
    side = [e for e in entries(web.get('sidebar', {})) if not urlsplit(e).scheme]
    nav = [e for e in entries(web.get('navbar', {})) if not urlsplit(e).scheme]
    for e in side+nav:
        if e not in site.pages and e not in site.urls: yield Fault('sidebar entry without a page', '_quarto.yml', e)
    for e,n in Counter(side).items():
        if n>1: yield Fault('sidebar entry without a page', '_quarto.yml', f'{e} stands there {n} times')
    for p in site.pages.values():
        if Path(p.path).stem!='404' and not {p.path, p.url} & set(side): yield Fault('page without a sidebar entry', p.path, '_quarto.yml lacks it')

def check_link(site, page, href):
    "The fault of one link, if it has any"
    for r in site.repo:
        if not href.startswith(r): continue
        return None if (site.root/unquote(href[len(r):].split('#')[0])).exists() else ('dead link', href)
    inside = href.startswith(site.home)
    u = urlsplit(href[len(site.home):] if inside else href)
    if u.scheme or u.netloc: return
    base = '' if inside or u.path.startswith('/') else posixpath.dirname(page.path)
    path = posixpath.normpath(posixpath.join(base, unquote(u.path).lstrip('/')))
    if not u.path and not inside: path = page.path
    elif path=='.' or u.path.endswith('/'): path = posixpath.normpath(posixpath.join(path, 'index.html'))
    target = site.pages.get(path) or site.urls.get(path)
    if target is None:
        there = (site.nbs/path).is_file() and not path.endswith('.ipynb') and not path.startswith('..')
        return None if there else ('dead link', href)
    if u.fragment and unquote(u.fragment) not in target.anchors:
        why = ' (made from backticks: show_doc it on its page, or say it in words)' if inside else ''
        return 'dead anchor', href + why

def check_links(site):
    for p in site.pages.values():
        linked = [Text(site.lookup.linkify(src)) for src,_ in p.texts]
        for href in dict.fromkeys(h for t in linked+p.shown for h in t.links):
            bad = check_link(site, p, href)
            if bad: yield Fault(bad[0], p.path, bad[1])

def check_images(site):
    for p in site.pages.values():
        for src in dict.fromkeys(s for t in [t for _,t in p.texts]+p.shown for s in t.images):
            if src.startswith('attachment:'): found = unquote(src[11:]) in p.attachments
            elif urlsplit(src).scheme or src.startswith('//'): continue
            else:
                base = '' if src.startswith('/') else Path(p.path).parent
                found = (site.nbs/base/unquote(src).lstrip('/')).is_file()
            if not found: yield Fault('missing image', p.path, src)

def check_outputs(site):
    for p in site.pages.values():
        exports = any(is_export(c) for c in p.raw.cells)
        if exports and not p.outputs: yield Fault('no stored output', p.path, 'it exports code and shows nothing')
        for o in p.outputs:
            if o['output_type']=='error': yield Fault('stored error', p.path, f"{o['ename']}: {o['evalue']}"[:200])

def check_symbols(site):
    for mod,ns in site.names.stale().items():
        what = f'{mod} exports {", ".join(ns)}, which the index does not know: run nbdev-export'
        yield Fault('unknown symbol', '_modidx.py', what)
    for p in site.pages.values():
        for name in dict.fromkeys(c for _,t in p.texts for c in t.codes):
            why = site.names.wrong(name)
            if why: yield Fault('unknown symbol', p.path, f'`{name}`: {why}')

def check_imports(site):
    "nbdev executes cells with imports to make the docs, so nothing else may stand in them"
    for p in site.pages.values():
        for c in p.raw.cells:
            body = c.parsed_() or []
            imports = any(isinstance(t, (ast.Import,ast.ImportFrom)) for t in body)
            others = [t for t in body if isinstance(t, (ast.Expr,ast.Assign)) and not isinstance(t.value, ast.Constant)]
            if imports and others:
                yield Fault('import beside other code', p.path, ast.unparse(others[0]).splitlines()[0][:80])

re_machine = re.compile(r'/site-packages/|/home/\w|/root/|/Users/\w|/tmp/\w')

def check_machine(site):
    "A stored output that says where it was made changes with every run, and says it to every reader"
    for p in site.pages.values():
        for o in p.outputs:
            text = joined(o.get('text', '')) + joined(o.get('data', {}).get('text/plain', ''))
            lines = [l for l in text.splitlines() if re_machine.search(l)]
            if lines: yield Fault('path of a machine', p.path, lines[0][:160])

def check_title(site):
    "nbdev makes the cell with the title into metadata: title, `>` and `- key: value`; anything else in it is lost"
    for p in site.pages.values():
        cell = next((c for c in p.raw.cells if c.cell_type=='markdown' and re.search(r'^# ', c.source, re.M)), None)
        rest = [l for l in cell.source.splitlines() if l.strip() and not re.match(r'# |> |- .*:', l)] if cell else []
        if rest and p.path.endswith('.ipynb'): yield Fault('lost text', p.path, rest[0][:80])

def check_size(site):
    "A page that is read has short outputs, and one that is cloned and merged is small"
    for p in site.pages.values():
        kb = (site.nbs/p.path).stat().st_size/1024
        if kb > KB: yield Fault('heavy notebook', p.path, f'{kb:.0f} KB, of {KB}')
        for o in p.outputs:
            data = o.get('data', {})
            if data.keys() & {'text/html','text/markdown'} or any(k.startswith('image/') for k in data): continue
            lines = (joined(o.get('text', '')) + joined(data.get('text/plain', ''))).splitlines()
            if len(lines) >= LINES: yield Fault('long output', p.path, f'{len(lines)} lines, the first: {lines[0][:80]}')

def check_words(site):
    "A reader who does not see an image reads what it shows"
    for p in site.pages.values():
        for src in (s for _,t in p.texts for s in t.wordless): yield Fault('image without words', p.path, src)

def words(src):
    "Words of the paragraphs of a text cell; a name in backticks is one, formulas are none"
    tokens = parser.parse(re.sub(r'\$\$.*?\$\$|\$[^$\n]+\$', '', src, flags=re.S))
    said = [t for before,t in zip(tokens, tokens[1:]) if before.type=='paragraph_open']
    texts = [c.content if c.type=='text' else 'name' for t in said for c in t.children if c.type in ('text','code_inline')]
    return len(' '.join(texts).split())

def check_long_text(site):
    "A text cell says one thing, and a plot or a line of code follows"
    for p in site.pages.values():
        if not p.path.endswith('.ipynb'): continue # a page of one cell
        for c in p.raw.cells:
            n = words(c.source) if c.cell_type=='markdown' else 0
            if n > WORDS: yield Fault('long text', p.path, f'{n} words, the first: {c.source[:60]!r}')

def check_fetched(site):
    "A page works without a network: it loads nothing from another host, and neither do the options of the site"
    for p in site.pages.values():
        for src in dict.fromkeys(s for t in [t for _,t in p.texts]+p.shown for s in t.fetched):
            yield Fault('fetched from outside', p.path, src)
    html = (site.yml.get('format') or {}).get('html')
    if html and html.get('html-math-method')!='mathml':
        yield Fault('fetched from outside', '_quarto.yml', 'html-math-method: anything but mathml loads a script')

def themes(x): return [t for o in (x.values() if isinstance(x, dict) else [x]) for t in (o if isinstance(o, list) else [o])]

def check_files(site):
    "Styles, logo, favicon and card are there"
    web,html = site.yml['website'],(site.yml.get('format') or {}).get('html') or {}
    named = [*themes(html.get('theme')), html.get('css'), web.get('favicon'), web.get('image'), web.get('navbar', {}).get('logo')]
    for f in named:
        if f and Path(f).suffix and not (site.nbs/f).is_file(): yield Fault('missing file of the site', '_quarto.yml', f)

CHECKS = (check_sidebar, check_links, check_images, check_outputs, check_symbols, check_imports, check_machine,
          check_title, check_size, check_words, check_long_text, check_fetched, check_files)
def faults(site): return [f for check in CHECKS for f in check(site)]

if __name__=='__main__':
    found = faults(Site(sys.argv[1] if sys.argv[1:] else Path(__file__).resolve().parents[1]))
    print(*found, sep='\n')
    sys.exit(bool(found))

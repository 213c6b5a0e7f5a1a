"""The figure of results on the home page: AP on four real sets after ten processor minutes, as an SVG.

`python benchmarks/bars.py nbs/images/own_data.svg` draws it from nbs/results/own_data_present.json. Its colours stand on white and on black."""
import argparse, json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1]/'nbs/results/own_data_present.json'
KINDS = {'deqdet_lite': ('deqdet_lite', '#c8741f'), 'fcos': ('FCOS', '#6b8096')}
SETS = dict(bccd='blood cells', cards='playing cards', deeppcb='circuit boards', raccoon='raccoons')
WIDTH,LEFT,RIGHT,BAR,GAP,TOP = 640,258,60,26,6,8 # pixels
INK = '#728597' # grey that can be read on white and on black

def rows(results):
    "(set, kind, AP, updates) of the trainings of ten minutes with the first seed"
    found = {(r['set'], r['kind']): r for r in results if r['minutes']==10 and r['seed']==0}
    return [(name, kind, found[name, kind]['AP'], found[name, kind]['updates_made']) for name in SETS for kind in KINDS]

def short(value): return f'{value:.3f}'.lstrip('0')

def bar(y, kind, value, updates):
    "One bar with its name before it and its value behind it"
    name,colour = KINDS[kind]
    width = value*(WIDTH - LEFT - RIGHT)/.9
    bold = ' font-weight="700"' if kind=='deqdet_lite' else ''
    return (f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end"{bold}>{name}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="3" fill="{colour}"/>'
            f'<text x="{LEFT + 8}" y="{y + 18}" fill="white" font-size="14">{updates} updates</text>'
            f'<text x="{LEFT + width + 7:.1f}" y="{y + 19}" font-size="18"{bold}>{short(value)}</text>')

def figure(results):
    "The SVG as text"
    parts = []
    y = TOP
    for i,(name,kind,value,updates) in enumerate(rows(results)):
        if i % len(KINDS)==0:
            y += 2*GAP*(i > 0)
            parts.append(f'<text x="0" y="{y + BAR + 9}" font-size="18" font-weight="700">{SETS[name]}</text>')
        parts.append(bar(y, kind, value, updates))
        y += BAR + GAP
    said = ', '.join(f'AP of {KINDS[kind][0]} on {SETS[name]} {short(value)}' for name,kind,value,_ in rows(results))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
            f'fill="{INK}" font-family="system-ui, sans-serif" font-size="16"><title>{said}</title>' + ''.join(parts) + '</svg>\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, help='where to write, .svg')
    args = parser.parse_args()
    args.file.write_text(figure(json.loads(RESULTS.read_text())), encoding='utf-8')

if __name__=='__main__': main()

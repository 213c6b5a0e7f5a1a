"""The film of the home page: boxes that settle, as an SVG in which they move.

`python benchmarks/film.py nbs/images/settling.svg --card nbs/images/card.jpg` makes it, and the card for links to the site, from
the start that the package ships and three generated scenes."""
import argparse, base64, io
from pathlib import Path
import numpy as np
from PIL import Image

SIDE,GAP,FOOT = 400,8,44            # pixels of a scene, between scenes, below them
STEPS = (0, 1, 2, 3, 4, 6, 8, 12)   # states that the film stops at
HOLD,MOVE,LAST = .45,.35,2.5        # seconds: at a state, between two, at the last
COLOURS = '#e45756 #f2a900 #2ca58d #4c8dff #b05cd6 #ff7f50 #8bc34a #00bcd4'.split()

def scenes(seeds, size=512):
    "Generated images (size,size,3), one for each seed"
    from deqdet.sets.scenes import scene
    return [scene(np.random.default_rng((21, seed)), size, size)[0] for seed in seeds]

def settle(images, fed=256):
    "Corners (T,B,N,4) in 0..1, scores (T,B,N) and classes at the end (B,N), after each of STEPS"
    import torch
    from deqdet.model import Feed
    from deqdet.sets.scenes import KIND_NAMES
    from deqdet.zoo import create_detector
    model = create_detector('deqdet_lite', vocab=KIND_NAMES, pretrained=True).eval()
    model.feed = Feed(fed, fed)
    small = [np.asarray(Image.fromarray(o).resize((fed, fed), Image.Resampling.LANCZOS)) for o in images]
    batch = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
    path = model.trajectory(batch, steps=max(STEPS) - model.hyper.strategy.extra)
    preds = [path[s][1] for s in STEPS]
    scores,labels = torch.stack([p.logits.detach().sigmoid() for p in preds]).max(-1)
    boxes = torch.stack([p.boxes.detach() for p in preds])/fed
    return boxes.numpy(), scores.numpy(), labels[-1].numpy()

def times():
    "keyTimes in 0..1 and seconds in all: each state is held, then left"
    now,keys = 0.,[]
    for i in range(len(STEPS)):
        stay = LAST if i==len(STEPS) - 1 else HOLD
        keys += [now, now + stay]
        now += stay + MOVE
    return [k/now for k in keys] + [1.], now

def animate(name, values, keys, seconds):
    "One attribute that takes a value at each state, and the first again at the end"
    held = [v for v in values for _ in range(2)] + [values[0]]
    values,keys = ';'.join(f'{v:.3g}' if abs(v) < 1 else f'{v:.1f}' for v in held), ';'.join(f'{k:.4f}' for k in keys)
    return f'<animate attributeName="{name}" values="{values}" keyTimes="{keys}" dur="{seconds:.2f}s" repeatCount="indefinite"/>'

def rect(boxes, opacity, colour, width, clock):
    "A box (T,4) in pixels that moves and fades (T,)"
    x1,y1,x2,y2 = boxes.T
    parts = dict(x=x1, y=y1, width=(x2 - x1).clip(1), height=(y2 - y1).clip(1), opacity=opacity)
    rest = ' '.join(f'{k}="{v[-1]:.2f}"' for k,v in parts.items())
    moves = ''.join(animate(k, v, *clock) for k,v in parts.items())
    return f'<rect {rest} rx="3" fill="none" stroke="{colour}" stroke-width="{width}">{moves}</rect>'

def queries(boxes, scores, labels, clock, min_score=.3, lost=30):
    "Queries of one scene: those that end above a score, and pale the best of those that end below"
    res,pale = [],np.linspace(.6, 0, len(STEPS))
    found = scores[-1] >= min_score
    boxes = (boxes*SIDE).clip(0, SIDE)
    order = np.argsort(scores[-1])[-(lost + int(found.sum())):] # those that are found are drawn last
    for q in order:
        if found[q]:
            colour = COLOURS[labels[q] % len(COLOURS)]
            res.append(rect(boxes[:, q], np.full(len(STEPS), .9), 'white', 5, clock))
            res.append(rect(boxes[:, q], np.ones(len(STEPS)), colour, 3, clock))
        else: res.append(rect(boxes[:, q], pale, 'white', 1, clock))
    return '\n'.join(res)

def caption(keys, seconds, width):
    "What the film shows at each state, and how far it is"
    res = []
    for i,s in enumerate(STEPS):
        text = {0: 'first guess', 1: 'after 1 step'}.get(s, f'after {s} steps')
        seen = animate('opacity', [float(i==j) for j in range(len(STEPS))], keys, seconds)
        first = 1 if i==len(STEPS) - 1 else 0
        res.append(f'<text x="0" y="{SIDE + 31}" opacity="{first}">{text}{seen}</text>')
        lit = animate('opacity', [1. if j >= i else .2 for j in range(len(STEPS))], keys, seconds)
        res.append(f'<circle cx="{width - 24*(len(STEPS) - i) + 12}" cy="{SIDE + 24}" r="6">{lit}</circle>')
    return '\n'.join(res)

def as_jpeg(image, quality=78):
    "data: address of an image"
    out = io.BytesIO()
    Image.fromarray(image).save(out, 'JPEG', quality=quality, optimize=True)
    return 'data:image/jpeg;base64,' + base64.b64encode(out.getvalue()).decode()

def film(images, boxes, scores, labels):
    "The SVG as text"
    n = len(images)
    width = n*SIDE + (n - 1)*GAP
    clock = times()
    parts = []
    for i,image in enumerate(images):
        picture = f'<image href="{as_jpeg(image)}" width="{SIDE}" height="{SIDE}"/>'
        inside = queries(boxes[:, i], scores[:, i], labels[i], clock)
        parts.append(f'<svg x="{i*(SIDE + GAP)}" width="{SIDE}" height="{SIDE}">{picture}\n{inside}</svg>')
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {SIDE + FOOT}" width="{width}" height="{SIDE + FOOT}" '
            'role="img" fill="#3f7fc0" font-family="system-ui, sans-serif" font-size="24">'
            '<title>Boxes move onto the objects, from the first guess to twelve steps</title>')
    return head + '\n'.join(parts) + caption(*clock, width) + '</svg>\n'

def card(image, boxes, scores, labels):
    "1200 x 630 pixels for links to the site: its name, and what is found in one scene"
    from matplotlib import font_manager
    from PIL import ImageDraw, ImageFont
    res = Image.new('RGB', (1200, 630), '#16324b')
    res.paste(Image.fromarray(image).resize((630, 630), Image.Resampling.LANCZOS), (570, 0))
    draw = ImageDraw.Draw(res)
    for q in np.nonzero(scores[-1] >= .3)[0]:
        corners = boxes[-1, q].clip(0, 1)*629 + [570, 0, 570, 0]
        draw.rectangle(list(corners), outline='white', width=7)
        draw.rectangle(list(corners + [1.5, 1.5, -1.5, -1.5]), outline=COLOURS[labels[q] % len(COLOURS)], width=4)
    def font(size): return ImageFont.truetype(font_manager.findfont('DejaVu Sans'), size)
    draw.text((50, 190), 'deqdet', font=font(110), fill='white')
    draw.text((54, 340), 'object detection by a step\nthat is repeated until\nthe boxes settle', font=font(36), fill='#cfe0f0', spacing=12)
    return res

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', type=Path, help='where to write, .svg')
    parser.add_argument('--seeds', type=int, nargs='+', default=[3, 4, 5], help='of the scenes')
    parser.add_argument('--card', type=Path, help='where to write the image that links to the site show, .jpg')
    args = parser.parse_args()
    images = scenes(args.seeds)
    boxes,scores,labels = settle(images)
    args.file.write_text(film(images, boxes, scores, labels), encoding='utf-8')
    if args.card: card(images[-1], boxes[:, -1], scores[:, -1], labels[-1]).save(args.card, quality=85, optimize=True)
    print(f'{args.file}: {args.file.stat().st_size/1024:.0f} KB')

if __name__=='__main__': main()

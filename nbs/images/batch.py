"Draws a batch of generated pictures with their boxes: `python nbs/images/batch.py FILE.png`"
import sys, tempfile
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
from deqdet.data import synth_coco, det_dls

def draw(path):
    "Write pictures on disk, read them back through the loaders, draw the first batch into `path`"
    with tempfile.TemporaryDirectory() as d:
        dls = det_dls(synth_coco(d, n_train=16, n_valid=8, size=128, seed=0), bs=8, size=128)
        dls.valid.show_batch(max_n=8, ncols=4, figsize=(8, 4))
    plt.savefig(path, dpi=75, bbox_inches='tight')

if __name__=='__main__':
    out = (sys.argv[1:] or ['batch.png'])[0]
    draw(out)
    print(f'A batch of generated pictures with their boxes: {out}')

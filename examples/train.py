"Train a small detector on a folder of images, in one or several processes"
import sys
from deqdet.data import det_dls
from deqdet.learner import det_learner
from deqdet.zoo import create_detector

folder = sys.argv[1]
epochs = int(sys.argv[2])
dls = det_dls(folder, bs=4)
learn = det_learner(dls, create_detector('deqdet_tiny', vocab=dls.vocab), recipe='tiny')
with learn.distrib_ctx(): learn.fit_published(epochs=epochs)

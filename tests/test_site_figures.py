"What the style sheet learns about figures, and how tables keep a number with its deviation"
import base64, io
import numpy as np, pandas as pd, pytest
from PIL import Image
from deqdet.pages import figure_classes, neat_table

def output(share, kind, width=300):
    "An output with an image of which a share is noise and the rest is white"
    pixels = np.full((100, width, 3), 255, np.uint8)
    noisy = int(share*100)
    pixels[:noisy] = np.random.default_rng(0).integers(0, 200, (noisy, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return dict(data={f'image/{kind}': base64.b64encode(file.getvalue()).decode()})

@pytest.mark.parametrize('kind', ('png','jpeg'))
def test_plots_are_told_from_photographs(kind):
    assert figure_classes([output(.1, kind)])==['plot']
    assert figure_classes([output(.5, kind)])==[]
    assert figure_classes([output(.1, kind), output(.9, kind)])==[] # one photograph is enough

def flat(color, share=.35):
    "An output with an image of which a share has one colour, as bars in a plot have"
    image = Image.new('RGB', (100, 100), 'white')
    image.paste(color, (0, 0, round(100*share), 100))
    image.save(file := io.BytesIO(), 'png')
    return dict(data={'image/png': base64.b64encode(file.getvalue()).decode()})

def test_bars_are_a_plot():
    assert figure_classes([flat((31,119,180))])==['plot']
    assert figure_classes([flat((0,0,0))])==[] # dark: a part of a photograph, or letters on black
    assert figure_classes([flat((31,119,180), .5)])==[]
    assert figure_classes([output(.35, 'png')])==[] # many colours

def test_wide_figures():
    assert figure_classes([output(.5, 'png', 700)])==['wide']
    assert figure_classes([output(.1, 'png', 700)])==['plot','wide']
    assert figure_classes([dict(data={'text/plain': 'x'}), dict(text='x')])==[]

def test_a_figure_is_as_wide_as_it_is_shown():
    sharp = output(.5, 'png', 700)
    assert figure_classes([sharp | dict(metadata={'image/png': dict(width=350, height=50)})])==[]

def test_a_deviation_stays_with_its_number():
    table = pd.DataFrame(dict(AP=['.62 ± .11', '.65 ± .08']), index=['cold', 'warm'])
    assert '.62&nbsp;±&nbsp;.11' in neat_table(table._repr_html_())

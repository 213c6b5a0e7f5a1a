"How the site shows symbols, sources, figures and tables: the edge cases behind the pages 23_docs and 24_pages"
import pandas as pd
from fastcore.nbio import dict2nb, mk_cell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from deqdet.boxes import move
from deqdet.data import Target, collate
from deqdet.docs import Shown, own_links, published
from deqdet.pages import Folds, fold_title, folded, neat_column, neat_table

TABLE = pd.DataFrame({'model': ['small', 'large'], 'parameters': [2563658, None], 'AP': [57.7, 52.]})


def after(text):
    "A text cell after `own_links`"
    cell = mk_cell(text, 'markdown')
    own_links(cell)
    return cell.source


def folds(folder, *sources):
    "Cells of a page in `folder` after `Folds`"
    nb = dict2nb(dict(cells=[mk_cell(s) for s in sources], metadata={}, nbformat=4, nbformat_minor=5))
    nb.path_ = f'nbs/{folder}/x.ipynb'
    return [c.source for c in NBProcessor(nb=nb, procs=[Folds], process=True).nb.cells]


# ---------------------------------------------------------------- 23_docs

def test_a_local_name_is_its_own_published_one():
    class Local: pass
    assert published(Local) is Local
    assert published(move) is move


def test_links_in_a_signature_stay():
    signature = Shown(collate)._repr_markdown_().split('```')[1]
    assert NbdevLookup().link_line(signature)==signature


def test_an_entry_may_have_another_name_and_no_docs():
    assert Shown(move, name='shift').nm=='shift'
    assert Shown(lambda x: x).docs==''


def test_signatures_show_no_nonetype():
    shown = str(Shown(Shown.__init__).dm)
    plain = str(BasicMarkdownRenderer(Shown.__init__).dm)
    assert shown.replace('=', ':NoneType=', 1)==plain


def test_classes_and_local_types_by_their_names():
    def local() -> Target: pass
    assert Shown(Shown).dm.splitlines()[0]=='class Shown('
    assert Shown(local).dm=='def local()->Target:'


def test_nbdev_shows_entries_by_our_renderer():
    assert type(show_doc(Target)).__name__=='Shown'
    assert get_config().renderer=='deqdet.docs.Shown'


def test_links_within_alt_texts_are_words():
    assert after('![in [`a`](u) and [`b`](v)](c.png)')=='![in `a` and `b`](c.png)'


def test_own_links_leave_the_rest():
    linked = NbdevLookup().linkify('`Target`, [a](b) `Target`')
    for text in (linked, '$a_{[0]}$ [1] (2)', 'x[`i`](j)', ''): assert after(text)==text


# ---------------------------------------------------------------- 24_pages

def test_the_title_of_a_source_names_what_it_defines():
    assert 'Source: A, b, c' in folded('A,b = 1,2\nclass c: pass')
    assert 'names of other modules' in folded('_all_ = ["a"]')


def test_titles_of_folds():
    assert fold_title('import torch\nfrom pathlib import Path')=='Imports'
    assert fold_title('fig,ax = plt.subplots()\nax.plot([1,2])\nax.set_xlabel("n");')=='Code of the figure'


def test_what_is_folded_depends_on_the_folder():
    assert folds('tutorials', 'import os', 'f(1)')[1]=='f(1)'
    assert folds('ops', 'import os')==['import os']
    assert folds('results', '!ls')==['!ls']


def test_columns():
    assert neat_column(['57.7', '52.0'])==['57.7', '52.0']
    assert neat_column(['12345.50', 'NaN'])==['12,345.50', '–']
    assert neat_column(['a', '1']) is None


def test_tables():
    html = neat_table(TABLE._repr_html_())
    assert '2,563,658' in html and 'NaN' not in html
    assert '<th>0</th>' not in html and '<th>0</th>' in neat_table(TABLE[['AP']]._repr_html_())
    assert neat_table('<p>no table</p>')=='<p>no table</p>'

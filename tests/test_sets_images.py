"Images, targets and batches: what the page shows without proving it"
import numpy as np, pytest, torch
from fastai.torch_core import TensorImage, to_concat
from PIL import Image, ImageOps
from deqdet.sets.images import DataError, Target, collate, fill_sizes, image_size, load_image, uncollate

one = dict(boxes=torch.tensor([[10., 10, 40, 30]]), labels=torch.tensor([0]))
two = dict(boxes=torch.tensor([[0., 0, 20, 20], [30, 5, 60, 50]]), labels=torch.tensor([1, 0]))
small = torch.full((3,40,60), 90, dtype=torch.uint8)
wide = torch.full((3,50,100), 200, dtype=torch.uint8)

def target(d, hw=(64,64), i=0): return Target(d['boxes'], d['labels'], torch.tensor(hw), torch.tensor(i))

def samples(): return [(TensorImage(small), target(one, (40,60), 1)), (wide, target(two, (50,100), 2))]

def test_fastai_glues_lists_by_position():
    "Why a target is no list of dictionaries: two images come back as one, and a shorter last batch ends it"
    glued = to_concat([[one], [two]])
    assert len(glued)==1
    assert glued[0]['boxes'].shape==(3,4)
    with pytest.raises(IndexError): to_concat([[one, two], [one]])

def test_targets_of_ragged_batches_stay_apart():
    b1 = collate([(small, target(one)), (wide, target(two))])
    b2 = collate([(small, target(one))])
    glued = to_concat([b1[2], b2[2]])
    assert type(glued) is Target
    assert [tuple(o.shape) for o in glued.boxes]==[(2,4),(2,4),(1,4)] and glued.image_id.shape==(3,)

def test_orig_is_size_unless_given():
    t = target(two)
    assert type(Target(list(t))) is Target and torch.equal(t.orig, torch.tensor([64, 64]))
    other = Target(t.boxes, t.labels, t.size, t.image_id, torch.tensor([128, 96]))
    assert other.orig.tolist()==[128, 96] and other.size.tolist()==[64, 64]

def test_a_batch_is_padded_and_plain():
    x,s,t = collate(samples())
    assert x.shape==(2,3,64,128)
    assert type(x) is torch.Tensor and [type(o) for o in t]==[torch.Tensor]*5
    assert s.tolist()==[[40,60], [50,100]]
    assert x.is_contiguous(memory_format=torch.channels_last)
    for (x1,t1),(x2,t2) in zip(samples(), uncollate((x,s,t))):
        assert torch.equal(x1.as_subclass(torch.Tensor), x2)
        for a,b in zip(t1, t2): assert torch.equal(a, b)

def test_an_image_without_objects_is_a_sample():
    nothing = Target(torch.zeros(0,4), torch.zeros(0, dtype=torch.long), torch.tensor([40,60]), torch.tensor(3))
    assert torch.equal(collate([(small, nothing)])[2].labels, torch.tensor([[-1]]))

@pytest.fixture
def turned(tmp_path):
    "A file of 20 x 40 pixels that says: turn me by 90 degrees"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new('RGB', (40,20), 'red').save(tmp_path/'turned.jpg', exif=exif)
    return tmp_path/'turned.jpg'

def test_an_image_is_turned_unless_annotated_unturned(turned):
    assert load_image(turned).shape==(3,40,20)
    assert load_image(turned, (20,40)).shape==(3,20,40)
    assert load_image(turned, (40,20)).shape==load_image(turned, (7,9)).shape==(3,40,20)

def test_grey_floats_become_bytes(): assert load_image(np.full((20,40), .5)).unique().tolist()==[128]

@pytest.mark.parametrize('shape, numpy, tensor', [
    ((3,40,4), (3,3,40), (3,40,4)), ((1,40,3), (3,1,40), (3,40,3)), ((4,1,1), (3,4,1), (3,1,1)), ((3,3,3), (3,3,3), (3,3,3)),
    ((20,40,3), (3,20,40), (3,20,40)), ((3,20,40), (3,20,40), (3,20,40)), ((1,4), (3,1,4), (3,1,4)), ((4,3), (3,4,3), (3,4,3))])
def test_arrays_have_their_channels_last_and_tensors_first(shape, numpy, tensor):
    "An image of 1, 3 or 4 rows was read as channels, and 3 of its columns as the image"
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    one, two = load_image(x), load_image(torch.from_numpy(x))
    assert one.shape==numpy and two.shape==tensor
    if len(shape)==3 and shape[2] < 5: # each pixel stays together
        np.testing.assert_array_equal(one.permute(1,2,0)[..., :1], x[..., :1])
    if len(shape)==3 and shape[0] < 5: np.testing.assert_array_equal(two[0], x[0])

def test_floats_beyond_the_range_are_an_error():
    "0..255 would become white, normalised pixels noise; what a resize leaves outside 0..1 is cut"
    for x in (np.linspace(0, 255, 600, dtype=np.float32).reshape(20, 30), torch.randn(3, 20, 30)*2):
        with pytest.raises(DataError, match='array with values from .* to .*: uint8, uint16 or floats 0..1'): load_image(x)
    assert load_image(np.array([[-.1, 0, 1.1]]*2)).unique().tolist()==[0, 255]

DEEP = np.linspace(0, 65535, 48*64).reshape(48, 64).astype(np.uint16)

@pytest.mark.parametrize('bits', [16, 12])
@pytest.mark.parametrize('kind', ['png', 'tif', 'big endian', 'pillow', 'array', 'tensor'])
def test_of_16_or_12_bits_the_upper_8_are_kept(tmp_path, kind, bits):
    "In every way in which a grey image may come; 12 bits, as cameras write them, had 16 grey values"
    deep = DEEP >> (16 - bits)
    big = deep.astype('>u2')
    x = {'array': deep, 'tensor': torch.from_numpy(deep), 'pillow': Image.fromarray(deep)}.get(kind, tmp_path/f'a.{kind}')
    if kind=='big endian':
        x = x.with_suffix('.tif')
        Image.frombytes('I;16B', deep.shape[::-1], big.tobytes()).save(x)
    elif kind in ('png','tif'): Image.fromarray(deep).save(x)
    np.testing.assert_array_equal(load_image(x), np.broadcast_to(DEEP >> 8, (3,48,64)))

@pytest.mark.parametrize('top, white', [(4095, 255), (4096, 16), (1023, 63), (16383, 63), (65535, 255), (0, 0)])
def test_the_largest_value_tells_12_bits_from_16(top, white):
    "A dark image of 12 bits is scaled as a bright one; other depths stay dark"
    assert load_image(np.array([[0, top]], np.uint16))[0].tolist()==[[0, white]]
    assert load_image(np.zeros((2,0), np.uint16)).shape==(3,2,0)

@pytest.mark.parametrize('x, says', [
    (DEEP.astype(np.int32), 'array with values from 0 to 65535'), (np.full((4,4), -1), 'from -1 to -1'),
    (Image.fromarray(DEEP.astype(np.int32)), 'mode I: values from 0 to 65535'), (Image.fromarray(np.eye(4, dtype=np.float32)), 'mode F: values from 0.0 to 1.0')])
def test_values_of_an_unknown_range_are_an_error(tmp_path, x, says):
    "They would be cut or wrap, and the image be white or black"
    with pytest.raises(DataError, match=says): load_image(x)
    if isinstance(x, Image.Image):
        x.save(tmp_path/'a.tif')
        with pytest.raises(DataError, match=f'a.tif: unreadable image .*{says}'): load_image(tmp_path/'a.tif')

@pytest.mark.parametrize('dtype', ['int32', 'int64', 'float32'])
def test_values_of_bytes_are_bytes_in_any_type(dtype):
    x = (DEEP >> 8).astype(dtype)
    np.testing.assert_array_equal(load_image(x if dtype=='int64' else Image.fromarray(x))[0], DEEP >> 8)
    assert load_image(np.zeros((2,0), 'int64')).shape==(3,2,0)

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['png', 'webp', 'tif'])
def test_files_of_every_format_are_turned(tmp_path, suffix, orientation):
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20,40,3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = orientation
    im.save(tmp_path/f'a.{suffix}', exif=exif, lossless=True)
    upright = ImageOps.exif_transpose(Image.open(tmp_path/f'a.{suffix}'))
    img = load_image(tmp_path/f'a.{suffix}')
    np.testing.assert_array_equal(img.permute(1,2,0), upright)
    assert image_size(tmp_path/f'a.{suffix}')==tuple(img.shape[1:])
    if suffix=='webp': assert load_image(tmp_path/'a.webp', (20,40)).shape==(3,20,40)

def test_errors_name_the_file(turned):
    cut = turned.with_name('cut.jpg')
    cut.write_bytes(turned.read_bytes()[:300])
    with pytest.raises(DataError, match='cut.jpg: unreadable image'): load_image(cut)
    with pytest.raises(DataError, match='none.jpg: no such image'): load_image(turned.with_name('none.jpg'))

def test_sizes_are_filled_in_where_they_are_missing(turned):
    "What the annotations say stays; what they do not say the file does, upright; a file that is not there gives 0"
    images = [dict(file_name='turned.jpg'), dict(file_name='turned.jpg', width=7, height=9), dict(file_name='none.jpg')]
    fill_sizes(images, turned.parent)
    assert [(o['height'], o['width']) for o in images]==[(40,20), (9,7), (0,0)]
    assert image_size(turned)==(40,20) and image_size(turned.with_name('none.jpg')) is None

@pytest.mark.parametrize('view', [np.s_[..., ::-1], np.s_[::-1], np.s_[:, ::-2]])
def test_a_reversed_array_is_an_image(view):
    "As OpenCV's users turn BGR into RGB"
    x = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)[view]
    assert torch.equal(load_image(x), torch.from_numpy(x.copy()).permute(2, 0, 1))

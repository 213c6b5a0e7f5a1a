"A detector goes to the hub and comes back, by a small server that speaks as the hub does"
import base64, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest, torch, yaml
from deqdet.ops.errors import CommandError

COMMIT = 'c0ffee'.ljust(40, '0')


class Hub(BaseHTTPRequestHandler):
    "Repositories in memory: made, written by one commit of plain files, listed and read"
    protocol_version = 'HTTP/1.0' # a connection for each request, so that a server that is switched off is off
    repos, seen, refuse = {}, [], None
    def log_message(self, *args): pass

    def say(self, status, body=None, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for k, v in {'Content-Length': len(data), **headers}.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data)

    def body(self): return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def do_POST(self):
        data, path = self.body(), self.path.split('?')[0]
        self.seen.append(('POST', path))
        if self.refuse: return self.say(self.refuse, dict(error='refused'))
        if path == '/api/repos/create':
            asked = json.loads(data)
            name = '/'.join(o for o in (asked.get('organization'), asked['name']) if o)
            self.repos.setdefault(name, {})
            return self.say(200, dict(url=f'{self.server.url}/{name}', id=name))
        if path == '/api/validate-yaml': return self.say(200, dict(errors=[], warnings=[]))
        found = re.fullmatch(r'/api/models/(.+?)/(preupload|commit)/main', path)
        if not found: return self.say(404, dict(error=path))
        name, what = found.groups()
        if what == 'preupload':
            files = [dict(path=o['path'], uploadMode='regular', shouldIgnore=False) for o in json.loads(data)['files']]
            return self.say(200, dict(files=files))
        for line in data.splitlines():
            o = json.loads(line)
            if o['key'] == 'file': self.repos[name][o['value']['path']] = base64.b64decode(o['value']['content'])
        return self.say(200, dict(commitUrl=f'{self.server.url}/{name}/commit/{COMMIT}', commitOid=COMMIT, success=True))

    def do_GET(self):
        path = self.path.split('?')[0]
        self.seen.append((self.command, path))
        found = re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?(?:/)?', path)
        if found:
            files = self.repos.get(found[1])
            if files is None: return self.say(404, dict(error='Repository not found'), **{'X-Error-Code': 'RepoNotFound'})
            if found[2] == 'tree':
                return self.say(200, [dict(type='file', path=k, size=len(v), oid=hashlib.sha1(v).hexdigest()) for k, v in files.items()])
            return self.say(200, dict(id=found[1], modelId=found[1], sha=COMMIT, private=False, siblings=[dict(rfilename=k) for k in files]))
        found = re.fullmatch(r'/([^/]+/[^/]+)/resolve/[^/]+/(.+)', path)
        data = self.repos.get(found[1], {}).get(found[2]) if found else None
        if data is None: return self.say(404, dict(error=path), **{'X-Error-Code': 'EntryNotFound'})
        self.say(200, data, **{'ETag': f'"{hashlib.sha1(data).hexdigest()}"', 'X-Repo-Commit': COMMIT})
    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1,localhost')
    Hub.repos, Hub.seen, Hub.refuse = {}, [], None
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def model():
    from deqdet.model import Feed
    from deqdet.zoo import create_detector
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', vocab=['cat', 'dog']).eval()
    model.feed, model.thresholds = Feed(64, 96), [.2, .4]
    return model


def Detector():
    from deqdet.using.hub import Detector
    return Detector


def test_there_and_back(hub, model, tmp_path):
    Detector()
    from deqdet.using.found import Found
    sample = Found(torch.zeros(3, 40, 60, dtype=torch.uint8), (40, 60), vocab=['cat', 'dog'])
    url = model.push_to_hub('me/cats', numbers=dict(AP=.25), about=dict(recipe='tiny'), sample=sample, endpoint=hub.url, token='hf_none')
    assert url == f'{hub.url}/me/cats' and sorted(Hub.repos['me/cats']) == ['README.md', 'config.json', 'model.safetensors', 'sample.png']
    card = Hub.repos['me/cats']['README.md'].decode()
    assert yaml.safe_load(card.split('---\n')[1])['pipeline_tag'] == 'object-detection'
    for o in '# me/cats', '| AP | 0.250 |', '| recipe | tiny |', 'cat, dog', '(sample.png)', '64 x 96': assert o in card
    kwargs = dict(endpoint=hub.url, cache_dir=tmp_path/'cache')
    again = Detector().from_pretrained('me/cats', **kwargs)
    assert (again.vocab, again.feed, again.thresholds, again.training) == (['cat', 'dog'], model.feed, [.2, .4], False)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    asked = len(Hub.seen)
    hub.shutdown()
    hub.server_close()
    offline = Detector().from_pretrained('me/cats', cache_dir=tmp_path/'cache', local_files_only=True)
    assert offline.vocab == again.vocab and len(Hub.seen) == asked
    assert Detector().from_pretrained('me/cats', **kwargs).vocab == again.vocab # the server is gone, the cache is not


def one_line(error):
    text = str(error.value)
    assert '\n' not in text and len(text) < 300
    return text


def test_faults_in_one_line(hub, model, tmp_path):
    load = Detector().from_pretrained
    kwargs = dict(endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(CommandError) as e: load('me/nothing', **kwargs)
    assert 'me/nothing: the hub has no such detector' in one_line(e)
    with pytest.raises(CommandError) as e: load('me/nothing', cache_dir=tmp_path, local_files_only=True)
    assert 'not fetched before' in one_line(e)
    Hub.refuse = 403
    with pytest.raises(CommandError) as e: model.push_to_hub('me/cats', endpoint=hub.url, token='hf_none')
    assert 'not allowed' in one_line(e)
    with pytest.raises(CommandError) as e: model.push_to_hub('me//cats', endpoint=hub.url, token='hf_none')
    assert "'user/name' was expected" in one_line(e)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CommandError) as e: load('me/nothing', **kwargs)
    assert 'cannot be reached' in one_line(e)
    with pytest.raises(CommandError) as e: model.push_to_hub('me/cats', endpoint=hub.url, token='hf_none')
    assert 'cannot be reached' in one_line(e)


def test_a_repository_without_a_detector(hub, tmp_path):
    Hub.repos['me/text'] = {'config.json': b'{}'}
    with pytest.raises(CommandError, match='no detector there'): Detector().from_pretrained('me/text', endpoint=hub.url, cache_dir=tmp_path)


def test_folders_come_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained('me/cats')
    assert Detector().from_pretrained('me/cats').vocab == ['cat', 'dog']
    with pytest.raises(FileNotFoundError): Detector().from_pretrained(tmp_path/'absent')

"""A page in headless Chromium, driven over its debugging protocol: what it computes, prints, asks for and looks like.

`python tests/browser.py FOLDER OUT` takes screenshots of all pages of a folder of HTML, wide and narrow, light and dark."""
import base64, functools, http.server, json, subprocess, sys, tempfile, threading, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from render import chromium

FLAGS = ['--headless=new','--no-sandbox','--disable-gpu','--disable-background-networking','--disable-component-update',
         '--no-first-run','--hide-scrollbars','--force-color-profile=srgb','--remote-debugging-port=0',
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'] # nothing outside of this machine is reached

def websocket():
    "The library that speaks to the browser, or None"
    try: import websocket
    except ImportError: return None
    return websocket

class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {'.mjs': 'text/javascript', '.wasm': 'application/wasm'}
    def log_message(self, *args): pass

@contextmanager
def served(folder):
    "The address of a folder"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()

class Browser:
    "One page of a browser"
    def __init__(self, folder, seconds=60):
        self.process = subprocess.Popen([chromium(), *FLAGS, f'--user-data-dir={folder}', 'about:blank'],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = Path(folder)/'DevToolsActivePort'
        self.wait(lambda: port_file.exists() and port_file.read_text().count('\n'), seconds, 'the browser does not start')
        port = port_file.read_text().split()[0]
        pages = lambda: [o for o in json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json')) if o['type']=='page']
        self.wait(pages, seconds, 'the browser has no page')
        self.socket = websocket().create_connection(pages()[0]['webSocketDebuggerUrl'], suppress_origin=True, timeout=600)
        self.number,self.errors,self.requests = 0,[],[]
        for domain in ('Page','Runtime','Log','Network','DOM'): self.call(f'{domain}.enable')

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def wait(self, condition, seconds, text):
        "Until a condition holds"
        end = time.monotonic() + seconds
        while not (res := condition()):
            assert time.monotonic() < end, text
            time.sleep(.1)
        return res

    def call(self, method, **params):
        "The answer to one command; events that come before it are noted"
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while True:
            said = json.loads(self.socket.recv())
            if said.get('id')==self.number: break
            self.note(said.get('method'), said.get('params', {}))
        assert 'error' not in said, f'{method}: {said["error"]}'
        return said['result']

    def note(self, method, params):
        if method=='Network.requestWillBeSent': self.requests.append(params['request']['url'])
        if method=='Runtime.exceptionThrown': self.errors.append(json.dumps(params['exceptionDetails'])[:600])
        if method=='Log.entryAdded' and params['entry']['level']=='error': self.errors.append(params['entry']['text'] + ' ' + params['entry'].get('url', ''))
        if method=='Runtime.consoleAPICalled' and params['type']=='error': self.errors.append(json.dumps(params['args'])[:600])

    def js(self, code):
        "The value of an expression, awaited"
        res = self.call('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in res, json.dumps(res['exceptionDetails'])[:1000]
        return res['result'].get('value')

    def until(self, code, seconds=120): return self.wait(lambda: self.js(code), seconds, f'not within {seconds} s: {code}')

    def look(self, width, height=900, dark=False):
        "A window of some size, light or dark"
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])

    def open(self, url):
        self.call('Page.navigate', url=url)
        self.until("document.readyState=='complete' && location.href!='about:blank'")

    def give(self, selector, file):
        "Choose a file as a reader does"
        found = self.call('Runtime.evaluate', expression=f'document.querySelector({json.dumps(selector)})')
        self.call('DOM.setFileInputFiles', objectId=found['result']['objectId'], files=[str(file)])

    def excess(self): return self.js('document.documentElement.scrollWidth - document.documentElement.clientWidth')

    def screenshot(self, file, whole=True):
        "PNG of the window, or of the whole page up to 6000 pixels"
        kwargs = {}
        if whole:
            width,height = self.js('[document.documentElement.clientWidth, document.documentElement.scrollHeight]')
            kwargs = dict(captureBeyondViewport=True, clip=dict(x=0, y=0, width=width, height=min(height, 6000), scale=1))
        data = self.call('Page.captureScreenshot', format='png', **kwargs)['data']
        Path(file).write_bytes(base64.b64decode(data))

def main():
    source,out = Path(sys.argv[1]),Path(sys.argv[2])
    with served(source) as address, tempfile.TemporaryDirectory() as tmp:
        browser = Browser(tmp)
        for file in sorted(source.rglob('*.html')):
            name = file.relative_to(source).with_suffix('')
            for width in (1280, 390):
                for dark in (False, True):
                    browser.look(width, dark=dark)
                    browser.open(f'{address}/{name}.html')
                    shot = out/f'{str(name).replace("/", "-")}_{width}_{"dark" if dark else "light"}.png'
                    shot.parent.mkdir(parents=True, exist_ok=True)
                    browser.screenshot(shot)
        browser.close()

if __name__=='__main__': main()

"""A Chromium that tests drive by its DevTools protocol, over two pipes."""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
FLAGS = (
    '--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run', '--hide-scrollbars',
    '--disable-dev-shm-usage', '--remote-debugging-pipe', '--force-device-scale-factor=1',
)  # fmt: skip
KEYS = {' ': ('Space', 32), 'Tab': ('Tab', 9), 'Home': ('Home', 36), 'End': ('End', 35)}
KEYS |= {'.': ('Period', 190), ',': ('Comma', 188)}
KEYS |= {
    f'Arrow{way}': (f'Arrow{way}', 37 + i) for i, way in enumerate(('Left', 'Up', 'Right', 'Down'))
}
SECONDS = 120
"""To wait for what takes a tenth of one; machines that test are busy."""


def found() -> str | None:
    """The browser of this machine, if it has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


READ = """((picture) => new Promise((done) => {
    const image = new Image(), canvas = document.createElement('canvas');
    image.onload = () => {
        [canvas.width, canvas.height] = [image.width, image.height];
        const pen = canvas.getContext('2d', {willReadFrequently: true});
        pen.drawImage(image, 0, 0);
        done(pen.getImageData(0, 0, image.width, image.height));
    };
    image.src = 'data:image/png;base64,' + picture;
}))"""
"""JavaScript: the pixels of a picture, which a browser can read itself."""


class Page:
    """A page, what it printed, and what it asked of a network."""

    def __init__(self, to_browser: int, from_browser: int):
        self.pipes, self.number, self.rest, self.session = (to_browser, from_browser), 0, b'', ''
        self.printed: list[Any] = []
        self.requested: list[str] = []
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        attached = self.send('Target.attachToTarget', targetId=target, flatten=True)
        self.session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.send(f'{domain}.enable')

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask for something, and wait for the answer."""
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': params}
        message |= {'sessionId': self.session} if self.session else {}
        os.write(self.pipes[0], json.dumps(message).encode() + b'\0')
        while (answer := self._next()).get('id') != self.number:
            self._note(answer)
        assert 'error' not in answer, f'{method}: {answer["error"]}'
        return answer['result']

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b'\0' not in self.rest:
            ready = select.select([self.pipes[1]], [], [], max(end - time.monotonic(), 0))[0]
            data = os.read(self.pipes[1], 1 << 20) if ready else b''
            assert data, 'the browser does not answer'
            self.rest += data
        message, _, self.rest = self.rest.partition(b'\0')
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get('method') == 'Network.requestWillBeSent':
            self.requested.append(event['params']['request']['url'])
        if event.get('method') in (
            'Runtime.consoleAPICalled', 'Runtime.exceptionThrown', 'Log.entryAdded',
        ):  # fmt: skip
            self.printed.append(event['params'])

    def open(self, path: Path, width: int = 1200, height: int = 1000, dark: bool = False) -> None:
        """Load a file, in a window of that size."""
        self.resize(width, height)
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.send('Emulation.setEmulatedMedia', features=[scheme])
        self.send('Page.navigate', url=path.as_uri())
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")
        count = 'addEventListener(kind, () => { ++window.handled; }, true)'
        self.run(f"window.handled = 0; ['keyup', 'mouseup'].forEach((kind) => {count})")

    def _after(self, send: Callable[[], object]) -> None:
        """Do something that ends a key or a click, and wait until the page has handled it."""
        before = self.run('handled')
        send()
        self.wait(f'handled > {before}')

    def resize(self, width: int, height: int) -> None:
        size = {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False}
        self.send('Emulation.setDeviceMetricsOverride', **size)

    def run(self, code: str) -> Any:
        """The value of an expression; that of a promise is waited for."""
        asked = {'expression': code, 'returnByValue': True, 'awaitPromise': True}
        answer = self.send('Runtime.evaluate', **asked)
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def wait(self, code: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(code):
            assert time.monotonic() < end, f'{code} does not come true'
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        for key in keys:
            code, number = KEYS[key]
            named = {'key': key, 'code': code, 'windowsVirtualKeyCode': number}
            text = {'text': key} if key == ' ' else {}
            self.send('Input.dispatchKeyEvent', type='keyDown', **named, **text)
            up = partial(self.send, 'Input.dispatchKeyEvent', type='keyUp', **named)
            self._after(up)

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """A click of the mouse on a part of an element."""
        asked = json.dumps(selector)
        self.run(f"document.querySelector({asked}).scrollIntoView({{block: 'center'}})")
        box = self.run(f'document.querySelector({asked}).getBoundingClientRect().toJSON()')
        x, y = box['x'] + across * box['width'], box['y'] + down * box['height']
        how = {'x': x, 'y': y, 'button': 'left', 'clickCount': 1}
        self.send('Input.dispatchMouseEvent', type='mousePressed', **how)
        self._after(partial(self.send, 'Input.dispatchMouseEvent', type='mouseReleased', **how))

    def picture(self) -> str:
        """The window as a PNG, base64."""
        return self.send('Page.captureScreenshot', format='png')['data']

    def colors(self, points: list[tuple[float, float]]) -> list[list[int]]:
        """Red, green and blue of some points of the window, as they are on the screen."""
        at = f"""({{data, width}}) => {json.dumps(points)}.map(([x, y]) => {{
            const first = 4 * (Math.floor(y) * width + Math.floor(x));
            return [...data.slice(first, first + 3)];
        }})"""
        return self.run(f'{READ}("{self.picture()}").then({at})')

    def differing(self, one: str, other: str) -> int:
        """How many numbers of two pictures are far apart; a rounded corner may differ a little."""
        count = '([a, b]) => a.data.filter((x, i) => Math.abs(x - b.data[i]) > 40).length'
        return self.run(f'Promise.all(["{one}", "{other}"].map({READ})).then({count})')


@contextmanager
def chromium(directory: Path) -> Iterator[Page]:
    """A page of a new browser, whose profile lies in `directory`."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # Chromium reads 3 and writes 4; bash puts them there.
    order = f'exec 198<&{to_read} 199>&{from_write} 3<&198 4>&199; exec "$0" "$@"'
    command = ['bash', '-c', order, found(), *FLAGS, f'--user-data-dir={directory}', 'about:blank']
    quiet = {
        'stdin': subprocess.DEVNULL,
        'stdout': subprocess.DEVNULL,
        'stderr': subprocess.DEVNULL,
    }
    process = subprocess.Popen(command, pass_fds=(to_read, from_write), **quiet)
    os.close(to_read)
    os.close(from_write)
    try:
        yield Page(to_write, from_read)
    finally:
        process.terminate()
        process.wait(SECONDS)
        os.close(to_write)
        os.close(from_read)

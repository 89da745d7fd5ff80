"""The page of decodes: its data, and how it behaves in a browser (Debian's Chromium, headless)."""

import dataclasses
import json
import re

import pytest

from cllm_jax.evaluation.outcome import OUTCOMES
from cllm_jax.evaluation.page import page
from tests import browser
from tests.evaluation.traces import PIECES, jacobi, plain, tree

EVIL = '</script><img src=x onerror=alert(1)>'
LATER = "document.querySelectorAll('.lane')[%d].querySelectorAll('.answer span:not(.later)').length"
FIRST = [plain(), jacobi(), tree()]
SECOND = [dataclasses.replace(t, prompt=EVIL, pieces=PIECES | {7: EVIL}) for t in FIRST[:2]]


def data_of(text: str) -> dict:
    """What the page holds."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    )


def test_a_page_holds_every_decode_once_and_loads_nothing():
    text = page(FIRST + SECOND)
    data = data_of(text)
    assert [p['text'] for p in data['prompts']] == ['p', EVIL]
    assert [[d['method'] for d in p['decodes']] for p in data['prompts']] == [[0, 1, 2], [0, 1]]
    assert [m['name'] for m in data['methods']] == ['AR', 'Jacobi', 'EAGLE']
    for trace, decode in zip(FIRST, data['prompts'][0]['decodes'], strict=True):
        assert [data['pieces'][i][0] for i in decode['answer']] == trace.answer
        assert sum(f['committed'] for f in decode['forwards']) == len(trace.answer)
    ar, fast, _ = data['methods']
    assert ar['speedup'] == 1 and fast['speedup'] == 2 and fast['tokens_per_second'] == 16
    assert not re.search(r'(src|href)="(?!data:)|@import|fetch\(|https?://(?!www.w3.org)', text)
    assert EVIL not in text and 'innerHTML' not in text


def test_a_page_without_times_or_ar_has_no_speed_up():
    assert data_of(page([jacobi()]))['methods'][0]['speedup'] is None
    assert data_of(page([plain(seconds=None)]))['methods'][0]['tokens_per_second'] is None


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    if browser.found() is None:
        pytest.skip('no Chromium here: apt-get install chromium')
    with browser.chromium(tmp_path_factory.mktemp('profile')) as shown:
        yield shown


@pytest.fixture
def shown(chromium, tmp_path):
    """The page of two prompts, which must print nothing and ask for nothing."""
    (path := tmp_path / 'page.html').write_text(page(FIRST + SECOND), 'utf-8')
    chromium.printed.clear()
    chromium.requested.clear()
    chromium.open(path)
    yield chromium
    assert chromium.printed == []
    assert {url.partition(':')[0] for url in chromium.requested} <= {'file', 'data'}


def written(shown) -> list[int]:
    """How many tokens of its answer each lane shows."""
    return [shown.run(LATER % i) for i in range(shown.run('state.lanes.length'))]


def test_one_clock_moves_all_methods(shown):
    assert written(shown) == [2, 2, 4], 'how far all are when the fastest is done'
    shown.press('Home')
    assert written(shown) == [0, 0, 0]
    shown.press('ArrowRight', 'ArrowRight')  # two forwards of Jacobi are 0.2 s, AR's take 0.125 s
    assert written(shown) == [1, 2, 1]
    shown.press('ArrowLeft')
    assert written(shown) == [0, 1, 0]
    shown.press('ArrowUp', 'ArrowRight', 'ArrowRight')  # now forwards of AR
    assert written(shown) == [2, 2, 4]
    shown.press('End')
    assert written(shown) == [8, 8, 4]
    shown.click('#time', 0.502)
    assert written(shown) == [4, 8, 4]
    assert shown.run("document.querySelector('#clock').textContent").endswith(' of 1000.0 ms')


def test_playing_ends_where_sliding_does(shown):
    """And looks the same."""
    shown.run("document.querySelector('#speed').value = '1'")
    shown.press('End')
    end = shown.picture()
    shown.press('Home')
    begin = shown.picture()
    shown.press(' ')
    shown.wait('state.time > 0')
    shown.wait('!state.playing')
    assert written(shown) == [8, 8, 4]
    assert shown.differing(shown.picture(), end) == 0 < 5000 < shown.differing(begin, end)
    shown.press(' ')
    shown.wait('state.time > 0 && state.time < 1')
    shown.press(' ')
    paused = shown.run('state.time')
    later = 'new Promise((done) => setTimeout(() => done(state.time), 200))'
    assert shown.run(later) == paused
    shown.press(' ')
    shown.wait(f'state.time > {paused}')
    shown.press('Home')  # a step stops it, too
    assert shown.run(later) == 0
    assert shown.differing(shown.picture(), begin) == 0


def test_a_method_and_a_forward_can_be_selected(shown):
    assert shown.run("document.querySelector('#chosen').textContent").endswith('Jacobi · m')
    shown.click('#forwards > li:nth-child(4) > button')
    assert written(shown)[1] == 6
    shown.click('#lanes .lane:nth-child(1) h3 button')
    assert shown.run("document.querySelectorAll('#forwards > li').length") == 8
    shown.click('#lanes .lane:nth-child(2) .map', down=0.9)
    assert written(shown)[1] == 8


def test_a_token_tells_what_became_of_it(shown):
    shown.click('#forwards > li:nth-child(2) .wrong')
    told = shown.run("document.querySelector('#detail').textContent")
    assert told == '"<7>" (id 7), token 2 of the answer: wrong guess; the answer has "<2>"'
    shown.press('Home', 'ArrowRight', 'ArrowRight', '.', '.')
    assert shown.run("document.querySelector('#detail').textContent") == told
    shown.press(',')
    assert 'part of the answer' in shown.run("document.querySelector('#detail').textContent")


def test_texts_are_texts_whatever_they_look_like(shown):
    shown.run("document.querySelector('#prompt').value = 1")
    shown.run("document.querySelector('#prompt').dispatchEvent(new Event('change'))")
    shown.press('End')
    assert shown.run("document.querySelector('#question').textContent") == EVIL
    assert EVIL in shown.run("document.querySelector('.answer').textContent")
    assert shown.run("document.querySelectorAll('img').length") == 0


def test_a_tree_is_drawn_as_a_tree(shown):
    """A node is to the right of what it follows; those that follow the same are in a column."""
    shown.press('End', 'ArrowDown')
    boxes = shown.run("""[...document.querySelectorAll('.lane:nth-child(3) .here .token')]
        .map((t) => [t.textContent, t.getBoundingClientRect().x, t.getBoundingClientRect().y])""")
    assert shown.run("document.querySelectorAll('.lane:nth-child(3) .tree').length") == 1
    at = {}
    for text, x, y in boxes:
        at.setdefault(text, []).append((x, y))
    (one,), (two,), (five,), (nine,) = (at[f'<{i}>'] for i in (1, 2, 5, 9))
    assert one[0] < two[0] == five[0] < nine[0] and one[1] == two[1] < five[1]
    assert nine[1] == two[1] and sorted(y for _, y in at['<3>'])[0] > nine[1]
    assert len(boxes) == 9


def test_a_collection_counts_forwards_instead_of_seconds(shown, tmp_path):
    (path := tmp_path / 'other.html').write_text(page([jacobi(seconds=None)]), 'utf-8')
    shown.open(path)
    shown.press('Home', 'ArrowRight')
    assert shown.run("document.querySelector('#clock').textContent") == 'forward 1 of 5'
    assert shown.run("document.querySelector('#speed').hidden") is True


@pytest.mark.parametrize('dark', [False, True])
def test_outcomes_look_different_and_can_be_read(dark, chromium, shown, tmp_path):
    """On the screen: each has its own fill or border, and letters that stand out from it."""
    shown.open(tmp_path / 'page.html', dark=dark)
    boxes = shown.run("""[...document.querySelectorAll('#legend .token')].map((t) => {
        const box = t.getBoundingClientRect(), style = getComputedStyle(t);
        const border = [style.borderTopStyle, style.borderTopColor, style.textDecorationLine];
        return [t.textContent, box.x, box.y, box.height, style.color, String(border)];
    })""")
    assert [name for name, *_ in boxes] == list(OUTCOMES)
    fills = shown.colors([(x + 4, y + height / 2) for _, x, y, height, *_ in boxes])
    assert (
        len({(tuple(fill), border) for fill, (*_, border) in zip(fills, boxes, strict=True)}) == 6
    )
    for fill, (name, *_, color, _) in zip(fills, boxes, strict=True):
        letters = [int(part) for part in re.findall(r'\d+', color)[:3]]
        light, deep = sorted((luminance(fill), luminance(letters)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 3.5, name
        assert (luminance(fill) < 0.5) or not dark or name == 'fast-forwarded'


def luminance(color: list[int]) -> float:
    """As WCAG defines it."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_a_phone_needs_no_sideways_scrolling(shown):
    shown.resize(360, 640)
    assert shown.run('document.documentElement.scrollWidth') == 360
    box = shown.run("document.querySelector('#play').getBoundingClientRect().toJSON()")
    assert box['bottom'] <= 640 and box['height'] >= 36, (
        'always there, and large enough for a thumb'
    )
    assert (
        shown.run("parseFloat(getComputedStyle(document.querySelector('.token')).fontSize)") >= 12
    )


def test_everything_can_be_reached_by_keyboard_and_has_a_name(shown):
    reached = set()
    for _ in range(40):
        shown.press('Tab')
        reached.add(shown.run('document.activeElement.id'))
    assert {'prompt', 'play', 'time', 'speed'} <= reached
    nodes = shown.send('Accessibility.getFullAXTree')['nodes']
    named = [n for n in nodes if n.get('role', {}).get('value') in ('button', 'slider', 'combobox')]
    assert len(named) > 10 and all(n['name']['value'] for n in named)

"""The downloader against a server on this machine that does what servers do."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from probekit.errors import WeightsError
from probekit.models import fetch as fetching
from probekit.models.fetch import cached_path, fetch, fetch_checked
from probekit.specs import Weights

CONTENT = os.urandom(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        with server.guard:
            server.requests.append((self.path, dict(self.headers)))
            cut = server.cuts.pop(0) if server.cuts else None
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/absent":
            self.send_error(404)
            return
        if self.path == "/page":
            body = b"<!DOCTYPE html><html><body>Google Drive can't scan this file for viruses</body></html>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        content, start = server.content, 0
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, server.etag)
        if server.ranges and wanted and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        body = content[start:]
        try:
            if cut is not None:
                self.wfile.write(body[:cut])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.wfile.write(body)
        except OSError:
            pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "time", SimpleNamespace(sleep=lambda seconds: None))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.etag, server.ranges = CONTENT, '"v1"', True
    server.cuts, server.requests, server.guard = [], [], threading.Lock()
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


def weights(server, path="/file", **more) -> Weights:
    return Weights(**({"url": server.url + path, "filename": "w.pth", "licence": "CC BY-NC 4.0"} | more))


def leftovers(path):
    return sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".lock"))


def test_fetches_once_checks_and_records(server, capsys):
    seen = []
    wanted = weights(server, "/moved", sha256=DIGEST, bytes=len(CONTENT))
    path = fetch(wanted, progress=lambda done, total: seen.append((done, total)))
    assert path == cached_path(wanted) and path.read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert "CC BY-NC 4.0" in capsys.readouterr().err
    assert leftovers(path) == ["w.pth", "w.pth.json"]
    record = json.loads(path.with_name("w.pth.json").read_text())
    assert record["sha256"] == DIGEST and record["url"] == wanted.url and record["bytes"] == len(CONTENT)
    assert record["sha256_given_by_publisher"] is True
    count = len(server.requests)
    assert fetch_checked(wanted).sha256 == DIGEST
    assert len(server.requests) == count, "a file that is there was fetched again"


def test_a_connection_that_breaks_is_resumed_where_it_broke(server):
    server.cuts = [1_000_000, 0, 500_000, None]
    path = fetch(weights(server, sha256=DIGEST))
    assert path.read_bytes() == CONTENT
    ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges == [None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]
    assert all(headers.get("If-Range") == '"v1"' for _, headers in server.requests[1:])


def test_a_download_given_up_goes_on_at_the_next_call(server):
    server.cuts = [1_200_000] + [0] * 20
    wanted = weights(server)
    with pytest.raises(WeightsError, match=r"broke off after 1.2 MB") as caught:
        fetch(wanted)
    assert caught.value.hint == "run again to go on from there"
    assert not cached_path(wanted).exists()
    server.cuts, server.requests = [], []
    assert fetch(wanted).read_bytes() == CONTENT
    assert [headers.get("Range") for _, headers in server.requests] == ["bytes=1200000-"]


def test_an_interrupted_download_goes_on_at_the_next_call(server):
    wanted = weights(server)

    def interrupt(done, total):
        if done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(wanted, progress=interrupt)
    assert not cached_path(wanted).exists()
    assert fetch(wanted).read_bytes() == CONTENT
    assert "Range" in server.requests[-1][1]


@pytest.mark.parametrize("change", ["content", "no ranges", "no validator", "other url"])
def test_what_cannot_be_resumed_starts_over(server, change):
    server.cuts = [1_000_000] + [0] * 20
    wanted = weights(server)
    with pytest.raises(WeightsError):
        fetch(wanted)
    server.cuts = []
    if change == "content":
        server.content, server.etag = CONTENT[::-1], '"v2"'
    elif change == "no ranges":
        server.ranges = False
    elif change == "no validator":
        part = cached_path(wanted).with_name("w.pth.part.json")
        part.write_text(json.dumps({"url": wanted.url, "validator": ""}))
    else:
        wanted = weights(server, "/file?v=2")
    assert fetch(wanted).read_bytes() == server.content


def test_a_complete_part_file_is_fetched_anew_rather_than_trusted(server):
    wanted = weights(server)
    part = cached_path(wanted).with_name("w.pth.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * len(CONTENT))
    part.with_name("w.pth.part.json").write_text(json.dumps({"url": wanted.url, "validator": '"v1"'}))
    assert fetch(wanted).read_bytes() == CONTENT


@pytest.mark.parametrize("promise", [{"sha256": "0" * 64}, {"bytes": len(CONTENT) - 1}])
def test_a_file_other_than_promised_is_thrown_away(server, promise):
    wanted = weights(server, **promise)
    with pytest.raises(WeightsError, match=r"000000000000\.\.\. is published|2,999,999 were published"):
        fetch(wanted)
    assert leftovers(cached_path(wanted)) == []


def test_a_file_that_changed_in_the_cache_is_noticed(server):
    wanted = weights(server)  # no published hash: the one of the first use counts
    path = fetch(wanted)
    damaged = bytearray(CONTENT)
    damaged[1_500_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(WeightsError, match="isn't the file that was first fetched") as caught:
        fetch(wanted)
    assert "delete" in caught.value.hint and path.read_bytes() == damaged, "never deleted behind one's back"
    path.with_name("w.pth.json").unlink()
    with pytest.raises(WeightsError, match="isn't the file that was published"):
        fetch(weights(server, sha256=DIGEST))


def test_a_file_put_there_by_hand_is_taken_and_recorded(server):
    wanted = weights(server)
    path = cached_path(wanted)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch_checked(wanted) == fetching.Fetched(path, DIGEST)
    assert not server.requests
    assert json.loads(path.with_name("w.pth.json").read_text())["sha256"] == DIGEST


def test_a_web_page_in_place_of_the_file_is_refused(server):
    wanted = weights(server, "/page")
    with pytest.raises(WeightsError, match=r"sent a web page in place of 'w.pth'") as caught:
        fetch(wanted)
    assert "browser" in caught.value.hint and str(cached_path(wanted)) in caught.value.hint
    assert not cached_path(wanted).exists()


def test_no_such_file(server):
    wanted = weights(server, "/absent")
    with pytest.raises(WeightsError, match=r"can't fetch 'w.pth': the server answered 404") as caught:
        fetch(wanted)
    assert str(cached_path(wanted)) in caught.value.hint and wanted.url in caught.value.hint


def test_without_a_network_the_message_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,host.invalid")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for host in (f"127.0.0.1:{port}", "host.invalid"):
        wanted = Weights(url=f"http://{host}/w", filename="w.pth", licence="MIT")
        with pytest.raises(WeightsError) as caught:
            fetch(wanted)
        assert "can't fetch 'w.pth'" in caught.value.message
        assert str(tmp_path / "weights" / "w.pth") in caught.value.message
        assert "\n" not in caught.value.message
        assert wanted.url in caught.value.hint


def test_the_command_says_which_of_several_failed_and_what_needs_no_fetching(server, tmp_path, cli):
    plugin = tmp_path / "nets.py"
    plugin.write_text(
        "from probekit import ModelSpec, Weights, hookimpl\nPROBEKIT_API = 1\n"
        "def spec(variant, published_as=None, **weights):\n"
        "    return ModelSpec(name='net', variant=variant, summary='s', target='json:dumps',\n"
        "                     published_as=published_as, weights=Weights(licence='MIT', **weights))\n"
        "@hookimpl\ndef probekit_models():\n"
        f"    return [spec('here', url='{server.url}/file', filename='here.pth'),\n"
        f"            spec('gone', url='{server.url}/absent', filename='gone.pth'),\n"
        "            spec('mini', 'here', bundled='json:w.safetensors'), spec('none')]\n"
    )
    words = ("--no-plugins", "--plugin", plugin, "fetch")
    code, _, err = cli(*words, "net:here", "net:mini")
    assert code == 2 and "the weights of 'net:mini' come with its pack" in err
    assert "the published model is 'net:here'" in err and not server.requests
    code, out, err = cli(*words, "net:here", "net:gone")
    assert code == 4 and out.startswith("net:here: ") and "error: 'net:gone': can't fetch 'gone.pth'" in err
    assert "'net:none': no weights are published" in cli(*words, "net:none")[2]


def test_a_full_disk_is_noticed_before_anything_is_written(server, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    wanted = weights(server)
    with pytest.raises(WeightsError, match=r"needs 3 MB more and .* has 1 MB free"):
        fetch(wanted)
    assert leftovers(cached_path(wanted)) == []


def test_a_cache_folder_that_cannot_be_made(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="can't use") as caught:
        fetch(weights(server))
    assert "PROBEKIT_CACHE" in caught.value.hint


def test_two_that_want_one_file_fetch_it_once(server):
    wanted = weights(server)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(wanted), range(4)))
    assert {path.read_bytes() == CONTENT for path in paths} == {True}
    assert Counter(path for path, _ in server.requests) == {"/file": 1}


def test_the_cache_is_the_users_unless_said_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("PROBEKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetching.cache_dir().parts[-2:] == ("probekit", "weights")
    monkeypatch.setenv("PROBEKIT_CACHE", "~/elsewhere")
    assert fetching.cache_dir() == fetching.Path.home() / "elsewhere" / "weights"
    with pytest.raises(WeightsError, match="no weights are published"):
        fetch(Weights())


def test_the_hub_fails_at_once_where_it_cannot_be_reached(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://host.invalid")
    with fetching.hub():
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False

"""What becomes of programs that mean no harm, and of callers that ask for what cannot be."""

import concurrent.futures
import os
import shutil
import statistics
import subprocess
import sys

import pytest

from labkit.sandbox import (
    KINDS,
    LANGUAGES,
    Language,
    Limits,
    Sandbox,
    SandboxUnavailable,
    available_kinds,
    get_language,
)
from labkit.sandbox.languages import interpreters

AVAILABLE = [kind for kind, reason in available_kinds().items() if not reason]
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="no room can be opened on this machine")


@pytest.fixture(scope="module", params=AVAILABLE)
def box(request):
    return Sandbox(request.param)


def test_says_which_kind_it_is(box):
    result = box.run("print('hello')")
    assert (result.status, result.stdout, result.stderr, result.returncode) == ("ok", "hello\n", "", 0)
    assert result.isolation == box.kind
    assert 0 < result.seconds < 60
    assert result.ok


def test_the_default_is_the_strongest_that_works():
    assert Sandbox().kind == next(kind for kind in KINDS if kind in AVAILABLE)


@pytest.mark.parametrize(
    ("code", "status", "returncode"),
    [
        ("raise SystemExit(3)", "error", 3),
        ("1 / 0", "error", 1),
        ("import os; os.abort()", "error", -6),
        ("import os; os._exit(0)", "ok", 0),
        ("x = bytearray(10 ** 9)", "memory", 1),
        ("import time; time.sleep(60)", "timeout", None),
        ("while True: pass", "timeout", None),
        ("while True: print('x' * 1000)", "output", None),
    ],
)
def test_statuses(box, code, status, returncode):
    limits = Limits(seconds=3, cpu_seconds=1, memory_mb=64, output_kb=32)
    if "sleep" in code:
        limits = Limits(seconds=0.4)
    result = box.run(code, limits=limits)
    assert (result.status, result.returncode) == (status, returncode), result
    if status == "error" and "/" in code:
        assert "ZeroDivisionError" in result.stderr
    if status == "output":
        assert len(result.stdout) >= 32 << 10


def test_input_files_arguments_environment(box):
    code = """
import os, sys
print(sys.stdin.read(), open("data/numbers.txt").read(), sys.argv[1:], os.environ["GREETING"])
open("own.txt", "w").write("mine")
import tempfile
tempfile.TemporaryFile().write(b"x")
print(sorted(os.listdir(".")))
"""
    files = {"data/numbers.txt": "1 2 3", "blob.bin": b"\x00\xff"}
    result = box.run(code, stdin="from outside", files=files, args=["a b", "c"], env={"GREETING": "héllo"})
    assert result.status == "ok", result
    first, second = result.stdout.splitlines()
    assert first == "from outside 1 2 3 ['a b', 'c'] héllo"
    assert {"blob.bin", "data", "main.py", "own.txt"} <= set(eval(second))


def test_much_input_and_much_output(box):
    text = "0123456789" * 30_000  # more than a pipe holds
    result = box.run(
        "import sys; sys.stdout.write(sys.stdin.read()[::-1])", stdin=text, limits=Limits(output_kb=400)
    )
    assert result.status == "ok"
    assert result.stdout == text[::-1]
    unread = box.run("print('done')", stdin=text)
    assert (unread.status, unread.stdout) == ("ok", "done\n")


def test_nothing_is_shared_between_rooms(box):
    box.run("open('left', 'w').write('x')")
    assert box.run("import os; print(os.listdir('.'))").stdout == "['main.py']\n"


def test_children_work_within_the_room(box):
    code = """
import subprocess, sys, threading
print(subprocess.run([sys.executable, "-I", "-S", "-c", "print(6 * 7)"], capture_output=True, text=True).stdout)
t = threading.Thread(target=print, args=("thread",)); t.start(); t.join()
"""
    assert box.run(code).stdout.split() == ["42", "thread"]


def test_rooms_side_by_side(box):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: box.run(f"print({n} ** 2)"), range(8)))
    assert [int(result.stdout) for result in results] == [n**2 for n in range(8)]


def test_further_readable_paths(box, tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "shown.txt")
        with open(path, "w") as file:
            file.write("shown")
        reading = f"print(open({path!r}).read())"
        assert box.run(reading).status == "error"
        shown = Sandbox(box.kind, readable=[path])
        assert shown.run(reading).stdout == "shown\n"
        assert shown.run(f"open({path!r}, 'w')").status == "error"


HELLO = {
    "python": "print(sum(map(int, input().split())))",
    "javascript": "const n = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);"
    "console.log(n.reduce((a, b) => a + b))",
    "perl": "$s += $_ for split ' ', <STDIN>; print \"$s\\n\";",
    "shell": "read a b; echo $((a + b))",
    "java": "public class Main { public static void main(String[] a) { var s = new java.util.Scanner(System.in);"
    "System.out.println(s.nextInt() + s.nextInt()); } }",
    "c": '#include <stdio.h>\nint main(void) { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); return 0; }',
    "cpp": "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }",
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_languages(name):
    row = LANGUAGES[name]
    word = (row.compile or row.run)[0]
    if word != "python" and shutil.which(word) is None:
        with pytest.raises(SandboxUnavailable, match="is not installed here"):
            Sandbox().run("", name)
        return
    box = Sandbox()
    if row.compile and box.kind == "landlock":
        pytest.skip("compilers change modes, which this kind refuses")
    result = box.run(HELLO[name], name, stdin="40 2\n", limits=Limits(seconds=30))
    assert (result.status, result.stdout) == ("ok", "42\n"), result


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_failed_compilation_is_said(box):
    if box.kind == "landlock":
        pytest.skip("compilers change modes, which this kind refuses")
    result = box.run("int main(void) { return }", "c")
    assert (result.status, result.phase) == ("error", "compile")
    assert "error" in result.stderr
    ran = box.run("int main(void) { return 3; }", "c")
    assert (ran.status, ran.phase, ran.returncode) == ("error", "run", 3)


def test_a_language_of_the_users_own(box):
    upper = Language("upper", "text.txt", ("tr", "a-z", "A-Z"))
    assert box.run("", upper, stdin="abc").stdout == "ABC"
    assert get_language(upper) is upper


def test_opens_quickly():
    """At most 80 ms above the bare program, in processor time, which a busy machine does not change."""
    python = interpreters()[0]

    def spent(call):
        before = os.times()
        call()
        after = os.times()
        return sum(after[:4]) - sum(before[:4])

    bare = [spent(lambda: subprocess.run([python, "-I", "-S", "-c", "pass"], check=True)) for _ in range(10)]
    for kind in AVAILABLE:
        box = Sandbox(kind)
        room = [spent(lambda box=box: box.run("pass")) for _ in range(10)]
        assert statistics.mean(room) - statistics.mean(bare) < 0.080, kind


# ------------------------------------------------------------------------------------------- misuse


def test_unknown_language():
    with pytest.raises(ValueError, match="did you mean 'python'"):
        Sandbox().run("", "pyton")
    with pytest.raises(ValueError, match="no language 'klingon'; known are python, javascript"):
        Sandbox().run("", "klingon")
    with pytest.raises(TypeError, match="a name or a Language"):
        Sandbox().run("", 3)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of bubblewrap, namespaces"):
        Sandbox("docker")
    with pytest.raises(ValueError, match="allow_weak=True"):
        Sandbox("weak")


def test_a_kind_that_does_not_work_is_refused():
    broken = [kind for kind, reason in available_kinds().items() if reason]
    for kind in broken:
        with pytest.raises(SandboxUnavailable, match=f"'{kind}' cannot be opened here"):
            Sandbox(kind)


def test_nothing_weaker_unasked(monkeypatch):
    from labkit.sandbox import kinds

    monkeypatch.setattr(kinds, "why_not", lambda kind: "switched off")
    with pytest.raises(SandboxUnavailable, match="allow_weak=True to run code that you trust"):
        Sandbox()
    weak = Sandbox(allow_weak=True)
    assert weak.kind == "weak"
    result = weak.run("import time; print('x', flush=True); time.sleep(60)", limits=Limits(seconds=0.5))
    assert (result.status, result.stdout, result.isolation) == ("timeout", "x\n", "weak")


def test_a_probe_that_gets_out_closes_the_kind(monkeypatch):
    from labkit.sandbox import kinds

    monkeypatch.setattr(kinds, "_PROBE", "print('read', %r, %d)")
    kinds.why_not.cache_clear()
    try:
        assert "a program got out: read [" in kinds.why_not(AVAILABLE[0])
    finally:
        kinds.why_not.cache_clear()


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"../x": "a"}, ValueError, "relative path inside the working folder"),
        ({"/etc/x": "a"}, ValueError, "relative path inside the working folder"),
        ({"main.py": "a"}, ValueError, "pass it as code"),
        ({"x": 3}, TypeError, "must be text or bytes, got int"),
        ({3: "a"}, TypeError, "3 must be a relative path as text"),
        (["x"], TypeError, "files must map relative paths"),
    ],
)
def test_files_outside(files, error, message):
    with pytest.raises(error, match=message):
        Sandbox().run("", files=files)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"args": [3]}, TypeError, "args must be words, got 3; write '3'"),
        ({"args": "ab"}, TypeError, "args must be a list of words, .* got 'ab'"),
        ({"args": None}, TypeError, "args must be a list of words, .* got None"),
        ({"args": ["a\0"]}, ValueError, "holds a zero byte"),
        ({"env": {"A": 3}}, TypeError, "env must map names to text, got 'A': 3; write '3'"),
        ({"env": {3: "A"}}, TypeError, "env must map names to text, got 3: 'A'"),
        ({"env": ["A"]}, TypeError, r"env must map names to text, .* got \['A'\]"),
        ({"env": {"A=B": "c"}}, ValueError, "'A=B' must be a name without '='"),
        ({"stdin": 3}, TypeError, "stdin must be text or bytes, got int"),
        ({"stdin": ["a"]}, TypeError, "stdin must be text or bytes, got list"),
    ],
)
def test_bad_arguments_open_no_room(given, error, message, monkeypatch):
    from labkit.sandbox import opening

    box = Sandbox()
    monkeypatch.setattr(opening, "_keep_watch", lambda *parts: pytest.fail("a room was opened"))
    with pytest.raises(error, match=message):
        box.run("", **given)


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="memory_mb must be at least 16, got 1"):
        Limits(memory_mb=1)
    with pytest.raises(TypeError, match="processes must be a whole number, got 2.5"):
        Limits(processes=2.5)
    with pytest.raises(TypeError, match="seconds must be a number"):
        Limits(seconds="5")
    with pytest.raises(TypeError, match="limits must be a Limits, got dict"):
        Sandbox(limits={})
    with pytest.raises(TypeError, match="limits must be a Limits, got dict"):
        Sandbox().run("", limits={"seconds": 1})
    with pytest.raises(TypeError, match="code must be text, got bytes"):
        Sandbox().run(b"")
    with pytest.raises(ValueError, match="does not exist"):
        Sandbox(readable=[tmp_path / "nothing"])
    with pytest.raises(TypeError, match="a list of paths"):
        Sandbox(readable="/tmp")
    with pytest.raises(ValueError, match="plain file name"):
        Language("x", "../x", ("true",))
    with pytest.raises(TypeError, match="tuple of words"):
        Language("x", "x", "true")


def test_import_is_light():
    code = "import sys, labkit.sandbox as s; s.Sandbox; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

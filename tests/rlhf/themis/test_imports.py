"""What imports what in the package."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import labkit.rlhf.themis

HOME = "labkit.rlhf.themis"


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions and for types only count too."""
    graph = {}
    for path in Path(labkit.rlhf.themis.__file__).parent.glob("*.py"):
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        graph[path.stem] = {n.module.removeprefix(HOME + ".") for n in found if n.module.startswith(HOME)}
    assert graph["bank"] == {"verdicts"}  # what the check reads is what is there
    list(graphlib.TopologicalSorter(graph).static_order())


def test_tools_need_no_torch():
    said = "from labkit.rlhf import ToolBank, Calculator, Calendar, CodeRunner, TraceFormat; import sys"
    said += "; ToolBank([Calculator()]).as_reward_fn(action='calculator')([''], ['#### 1'])"
    said += "; sys.exit(sorted({'torch', 'transformers'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

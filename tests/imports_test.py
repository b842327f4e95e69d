"""The walls between the parts (CONTRIBUTING.md "Walls"), read from the sources."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted(p for top in ("uajax", "kernels") for p in (ROOT / top).rglob("*.py"))

# Where each heavy package may be imported as the module loads. Anywhere else it is imported in
# the function that needs it, since the machine that trains may lack it.
HOMES = {
  "librosa": ("uajax.speech",),
  "tensorflow_datasets": ("uajax.data.subject",),
  "av": ("uajax.media",),
  "grain": ("uajax.data.loader",),
  "ai_edge_litert": ("uajax.preprocess",),
  "tyro": ("uajax.cli",),
  "ray": ("uajax.sweep.on_ray",),
  "optuna": (),
  "matplotlib": (),
  "safetensors": (),
  "viser": (),
  "torch": (),
  "tensorflow": (),
}
# module prefix -> what it may never import, not even in a function
FORBIDDEN = {
  **{f"uajax.{name}": ("uajax.data", "uajax.preprocess", "uajax.train", "uajax.runs", "uajax.cli")
     for name in ("models", "render", "avatar", "losses", "camera", "metrics", "lpips")},
  "uajax.train": ("uajax.preprocess", "uajax.cli"),
  "uajax.runs": ("uajax.train", "uajax.preprocess", "uajax.cli"),
  "uajax": ("torch", "tensorflow"),
}  # fmt: skip
KERNELS_MAY = {"jax", "numpy", "chex", "jaxtyping", "kernels"}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module, prefix):
  return module == prefix or module.startswith(prefix + ".")


def imports(path):
  """Yields (module, is it imported as the file loads?) for every import of a file."""
  name, tree = module_name(path), ast.parse(path.read_text(encoding="utf-8"))
  lazy = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
          for node in ast.walk(f)}  # fmt: skip
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
      base = package[: len(package) - node.level + 1] if node.level else []
      base = ".".join([*base, *([node.module] if node.module else [])])
      found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    else:
      continue
    for module in found:
      yield module, id(node) not in lazy


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_walls(path):
  name = module_name(path)
  for module, eager in imports(path):
    top = module.split(".")[0]
    if within(name, "kernels"):
      assert top in KERNELS_MAY | sys.stdlib_module_names, f"{name} imports {module}"
    if name in ("uajax.types", "uajax.config"):
      assert top not in ("uajax", "kernels"), f"{name} imports {module}: nothing of ours"
    for prefix, banned in FORBIDDEN.items():
      if within(name, prefix):
        bad = [b for b in banned if within(module, b) and not within(name, b)]
        assert not bad, f"{name} imports {module}"
    if eager and top in HOMES:
      assert any(within(name, home) for home in HOMES[top]), f"{name} imports {module} eagerly"

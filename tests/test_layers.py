"""A module imports only from floors below its own; the writing and the reading half never meet."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = [
    {"errors", "nearest", "settings", "ranks", "stopping", "counters", "blocks", "hashes", "scores"},
    {"tail", "shuffle", "identity", "view_ops", "positions", "moving", "progress", "process_group"}
    | {"byte_model", "view_boxes"},
    {"labels"},
    {"views", "sources", "models", "sparsify", "losses", "codec"},
    {"manifest", "batches", "token_batches", "language", "fused", "pairing", "student_views"},
    {"stores", "teacher", "thaw", "byte_batches", "detection"},
    {"dense_teacher"},
    {
        "detection_teacher",
        "planning",
        "labelling",
        "mirror",
        "open_units",
        "stored_units",
        "doctor",
        "generation",
    },
    {"capture", "cache", "status"},
    {"reader", "checkpoints", "tasks", "estimate", "unit_faults"},
    {"loader", "samplers", "adaptation"},
    {"sweep_space", "student", "verify", "convert", "slim", "fidelity"}
    | {"paired", "trainer", "importing", "gc", "fusion", "adapters"},
    {"config"},
    {"modalities"},
    {"feeds"},
    {"runs"},
    {"parallel", "sweep", "report"},
    {"export"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
WRITING = {
    "positions",
    "sparsify",
    "teacher",
    "dense_teacher",
    "detection_teacher",
    "planning",
    "labelling",
    "open_units",
    "capture",
}
READING = {"stored_units", "cache", "reader", "shuffle", "losses", "fused"}


def modules():
    return sorted(path for path in (ROOT / "pipeline").rglob("*.py") if path != ROOT / "pipeline/__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of `pipeline` that a module imports anywhere, type-checking blocks included."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in ("pipeline", "stages")
        ):
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            assert parts[0] == "pipeline", f"{path.name} imports {node.module}: pipeline never imports stages"
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {parts[1] for parts in names if parts[0] == "pipeline" and len(parts) > 1}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    assert room in FLOOR_OF, (
        f"{room} has no floor: add it to tests/test_layers.py and docs/design/architecture.md"
    )
    for other in imported_rooms(path) - {room}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} (floor {FLOOR_OF[room]}) imports {other}"


@pytest.mark.parametrize(
    ("half", "other"), [(WRITING, READING), (READING, WRITING)], ids=["writing", "reading"]
)
def test_the_two_halves_never_import_each_other(half, other):
    for path in modules():
        if room_of(path) in half:
            assert not imported_rooms(path) & other, f"{room_of(path)} reaches into the other half"


def test_every_room_is_known():
    assert {room_of(path) for path in modules()} == set(FLOOR_OF)

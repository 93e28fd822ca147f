"""Diagnose the installation, this machine and stores.

softcache doctor
softcache doctor s3://bucket/prefix runs/digits/cache
"""

import sys
from typing import Any

import click

from .options import CACHE, json_option, print_json, print_table

__all__ = ["doctor"]

GIB = 2**30
PURPOSES = {
    "cloud": "caches in s3://, gs://, az://",
    "dask": "capture on many processes and machines",
    "detection": "detectors and COCO",
    "export": "ONNX files of students",
    "frames": "caches as tables of pandas and xarray",
    "lightning": "students in Lightning",
    "lora": "adapters of language models",
    "report": "HTML reports of runs",
    "sweep": "searches of a student's settings",
    "text": "language models of Hugging Face",
    "track": "TensorBoard",
    "train": "torch: teachers and students",
    "translation": "encoder-decoder models",
    "vision": "image models of timm and torchvision",
    "vllm": "teachers in vLLM",
}
"""What each extra is for."""
BYTES_OF_16_BITS, SHARE_FOR_WEIGHTS = 2, 0.7


@click.command()
@click.argument("urls", metavar="[STORE]...", type=CACHE, nargs=-1)
@json_option
def doctor(urls: tuple[str, ...], as_json: bool) -> None:
    """Show versions, devices, free space and what this machine can do; test each STORE (a path, s3://, gs://, az://).

    A store is tested by writing, listing, reading and deleting one small object. Exits with 1 if a STORE or a GPU does not
    work.

    \b
    Example:
      softcache doctor runs/digits/cache
      softcache doctor s3://bucket/prefix
    """
    from softcache.tools.doctor import devices, free_space, store_access, versions

    machine = devices()
    found: dict[str, Any] = {"versions": versions(), "devices": machine, "free_space": free_space()}
    found["stores"] = [store_access(url) for url in urls]
    broken = [store["url"] for store in found["stores"] if store["failed"]]
    broken += [gpu["name"] for gpu in machine["cuda"] if gpu["fault"]]
    found["can"] = _abilities(found)
    found["broken"] = broken
    if as_json:
        print_json(found)
    else:
        _print(found)
    if broken:
        sys.exit(1)


def _abilities(found: dict[str, Any]) -> list[str]:
    """Returns what this machine can do, as verb phrases."""
    machine, extras = found["devices"], found["versions"]["extras"]
    if found["versions"]["packages"]["torch"] is None:
        return [
            "read and verify caches; for teachers and students: pip install 'softcache[vision]' or 'softcache[text]'"
        ]
    working = [gpu for gpu in machine["cuda"] if not gpu["fault"]]
    can = []
    if working:
        memory = max(gpu["total_bytes"] for gpu in working)
        billions = memory * SHARE_FOR_WEIGHTS / BYTES_OF_16_BITS / 1e9
        can.append(
            f"run teachers and students on CUDA; about {billions:.1f} billion parameters in 16 bits fit one GPU, "
            f"with {1 - SHARE_FOR_WEIGHTS:.0%} left for the work"
        )
    elif machine["mps"]:
        can.append("run teachers and students on MPS, the GPU of a Mac")
    else:
        can.append("run small teachers and students on the CPU; no working GPU")
    missing = {
        name: [part for part, version in parts.items() if version is None] for name, parts in extras.items()
    }
    if "dask" in missing and not missing["dask"]:
        can.append(
            f"label with {len(working) or machine['cpu_cores']} processes at once (teacher-logits --dask auto)"
        )
    if "text" in missing:
        can.append("work with images and text" if not missing["text"] else "work with images, not with text")
    if "cloud" in missing:
        can.append(
            "keep caches in folders" + (" and buckets" if not missing["cloud"] else ", not in buckets")
        )
    return can


def _print(found: dict[str, Any]) -> None:
    versions = found["versions"]
    rows = [("softcache", "", versions["softcache"]), ("python", "", versions["python"])]
    rows += [(name, "", version or "missing") for name, version in versions["packages"].items()]
    for extra, parts in versions["extras"].items():
        there = not [part for part, version in parts.items() if version is None]
        purpose = PURPOSES.get(extra, "")
        rows.append((f"extra {extra}", purpose, "present" if there else f"pip install 'softcache[{extra}]'"))
    print_table("versions", ("what", "for", "version"), rows)
    machine = found["devices"]
    threads = machine["cpu_threads"]
    devices = [
        ("CPU", f"{machine['cpu_cores']} cores" + (f", {threads} threads of torch" if threads else ""))
    ]
    for number, gpu in enumerate(machine["cuda"]):
        free = "" if gpu["free_bytes"] is None else f", {gpu['free_bytes'] / GIB:.1f} free"
        state = f"does not work: {gpu['fault']}" if gpu["fault"] else "works"
        devices.append(
            (f"cuda:{number}", f"{gpu['name']}, {gpu['total_bytes'] / GIB:.1f} GiB{free}; {state}")
        )
    devices.append(("MPS", "present" if machine["mps"] else "none"))
    for name, place in found["free_space"].items():
        devices.append((f"disk for {name}", f"{place['folder']}: {place['free_bytes'] / GIB:.1f} GiB free"))
    print_table("this machine", ("device", "what"), devices)
    click.echo("This machine can " + "; ".join(found["can"]) + ".")
    for store in found["stores"]:
        where = "" if store["tried"] == store["url"] else f" (does not exist yet; tested {store['tried']})"
        if store["failed"] is None:
            click.echo(
                f"store {store['url']}{where}: works: {', '.join(store['done'])}; locks: {store['locks']}"
            )
        else:
            failed = store["failed"]
            click.echo(
                f"store {store['url']}{where}: {failed['step']} failed: {failed['message']}; {failed['to_do']}",
                err=True,
            )

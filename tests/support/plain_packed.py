"""A second reader of packed records, written from docs/format.md alone: slow, obvious, and nothing of softcache in it.

Where this and `softcache.cache.codecs` disagree, one of them or the document is wrong.
"""

import math
import struct


def num_bytes(number):
    return max(1, -(-number.bit_length() // 8))


def unzigzag(number):
    return number // 2 if number % 2 == 0 else -(number + 1) // 2


def as_float(number, width):
    """The float that has these bits."""
    return struct.unpack("<e" if width == 2 else "<f", number.to_bytes(width, "little"))[0]


def float32(number):
    return struct.unpack("<f", struct.pack("<f", number))[0]


def prediction(temperatures, has_stats):
    """Returns, for each temperature from the last to the second, the weights by name of what is known.

    Names: "F(0)", "slope", and the number of a temperature in the grid, 0 for F(1).
    """
    place = {"F(0)": 0.0, "slope": 0.0} | {g: 1.0 / t for g, t in enumerate(temperatures)}
    known = ["F(0)", *(["slope"] if has_stats else []), 0]
    reach, out = dict.fromkeys(known, 1.0), {}
    for g in range(len(temperatures) - 1, 0, -1):
        taken = sorted(known, key=lambda name: abs(place[name] - place[g]))[:4]
        while True:
            weights = weights_of(taken, place, place[g])
            reach[g] = 1 + sum(abs(weight) * reach[name] for name, weight in weights.items())
            if reach[g] <= 2**30 or len(taken) == 1:
                break
            taken.pop()
        out[g] = weights
        known.append(g)
    return out


def weights_of(taken, place, beta):
    weights = {}
    for name in taken:
        if name == "slope":
            continue
        others = [place[other] for other in taken if other not in (name, "slope")]
        weights[name] = math.prod((beta - other) / (place[name] - other) for other in others)
        if "slope" in taken and name != "F(0)":
            weights[name] *= beta / place[name]
        elif "slope" in taken:
            weights["slope"] = weights[name] * beta
            weights[name] *= 1 + beta * sum(1 / other for other in others)
    return weights


def fields_of(codec):
    """Returns [(name, slots, width)] of a record, in their order; `codec` is the manifest's."""
    v, k, grid, step = codec["num_classes"], codec["k"], len(codec["temperatures"]), codec.get("step")
    has_stats, sampling = codec.get("stats", True), codec.get("sampling")
    tail = codec["tail"]
    fixed, substeps = tail != "float32", 16 if tail == "steps" else 256
    id_bits = max(1, (v - 1).bit_length())
    high = min(bits for bits in (0, 1, 2, 4, 8) if bits >= id_bits % 8)
    far = 0 if step is None else math.floor(65504 / step) + 1
    largest = 0.0
    for weights in prediction(codec["temperatures"], has_stats).values():
        largest = max(largest, sum(abs(weight) for weight in weights.values()))
    fields = [
        ("ids", k, id_bits // 8),
        ("gaps", k - 1, num_bytes(far)) if step is not None else ("half", k, 2),
        ("ids_high", -(-k * high // 8), 1),
        ("first", 1 if step is not None else 0, num_bytes(2 * substeps * far)),
        ("tail", 1 if fixed else grid, num_bytes(2 * substeps * far) if tail == "steps" else 4),
        ("tail_rest", grid - 1 if fixed else 0, num_bytes(math.floor(2 * far * (1 + largest)))),
        ("target", 1, 4 if step is None else num_bytes(2 * far)),
        ("moments", 3 if has_stats else 0, 2),
        ("support", 1 if has_stats else 0, 4),
        ("counts", k, num_bytes(sampling["draws"])) if sampling and sampling["replacement"] else ("", 0, 0),
        ("threshold", 1 if sampling and not sampling["replacement"] else 0, 4),
        ("infinite", -(-(grid + 1) // 8), 1),
        ("used", 1, num_bytes(k)),
        ("finite", 1, num_bytes(k)),
    ]
    return [field for field in fields if field[1] * field[2]]


def numbers_of(codec, record):
    """Returns the numbers in a record's fields, by name."""
    out, start = {}, 0
    for name, slots, width in fields_of(codec):
        out[name] = [
            sum(record[start + byte * slots + slot] << 8 * byte for byte in range(width))
            for slot in range(slots)
        ]
        start += slots * width
    assert start == len(record)
    return out


def decode(codec, record):
    """Returns the content of one record, by column.

    Args:
        codec: the manifest's `codec`.
        record: R bytes.
    """
    found = numbers_of(codec, record)
    v, k, grid, step = codec["num_classes"], codec["k"], len(codec["temperatures"]), codec.get("step")
    (used,), (finite,) = found["used"], found["finite"]
    out = {}

    id_bits = max(1, (v - 1).bit_length())
    high = min(bits for bits in (0, 1, 2, 4, 8) if bits >= id_bits % 8)
    packed = sum(byte << 8 * place for place, byte in enumerate(found.get("ids_high", [])))
    out["ids"] = [v] * k
    for slot in range(used):
        low = found["ids"][slot] if "ids" in found else 0
        out["ids"][slot] = low + ((packed >> slot * high) % 2**high << id_bits // 8 * 8)

    out["log_probs"] = [-math.inf] * k
    if step is None:
        for slot in range(finite):
            out["log_probs"][slot] = as_float(found["half"][slot], 2)
        target = as_float(found["target"][0], 4)
    else:
        substep = step / (16 if codec["tail"] == "steps" else 256)
        first = substep * unzigzag(found["first"][0])
        for slot in range(finite):
            out["log_probs"][slot] = float32(first - step * sum(found["gaps"][:slot] if slot else []))
        target = float32(first - step * unzigzag(found["target"][0]))

    has_stats = codec.get("stats", True)
    if has_stats:
        out["stats"] = [as_float(bits, 2) for bits in found["moments"]] + [as_float(found["support"][0], 4)]
    if "counts" in found:
        out["counts"] = found["counts"]
    if "threshold" in found:
        out["log_threshold"] = as_float(found["threshold"][0], 4)

    if codec["tail"] == "steps":
        tail = [first - substep * unzigzag(found["tail"][0])]
    else:
        tail = [as_float(bits, 4) for bits in found["tail"]]
    if codec["tail"] != "float32":
        exact = codec["sampling"]["exact"] if "sampling" in codec else k
        dropped = out["stats"][3] - min(finite, exact) if has_stats else v - min(used, exact)
        known = {
            "F(0)": math.log(max(1, dropped)),
            "slope": out["stats"][1] if has_stats else 0.0,
            0: 0.0 if tail[0] == -math.inf else max(-65504.0, tail[0]),
        }
        for place, (g, weights) in enumerate(prediction(codec["temperatures"], has_stats).items()):
            expected = sum(weight * known[name] for name, weight in weights.items())
            known[g] = expected + step * unzigzag(found["tail_rest"][place])
        tail = [float32(tail[0]), *(float32(known[g]) for g in range(1, grid))]
    infinite = [found["infinite"][bit // 8] >> bit % 8 & 1 for bit in range(grid + 1)]
    out["log_tail"] = [-math.inf if lost else value for lost, value in zip(infinite, tail, strict=False)]
    out["target_log_prob"] = -math.inf if infinite[grid] else target
    return out

r"""Re-prove the lower bound of a proof file: ``python verify.py FILE [TOKENS TARGETS]``.

This file needs Python and NumPy 2 alone, shares no code with the package that wrote the proof, and can be copied anywhere.

**Statement.** For tokens X_i (n, s, d), targets y_i and gates D_ig in {0, 1} as they are stored, and f(X) = sum_g A_g(Z_g) the lifted head of
a mixer, every choice of lifted matrices (so every head of this form, with any number of neurons) has an objective

    1/n sum_i loss(f(X_i), y_i) + beta sum_g ||Z_g||_*  >=  bound.

**Proof.** By Fenchel and by the duality of the nuclear and the spectral norm, D(x) = -1/n sum_r conj(x_r, y_r) is a lower bound for every x
with max_g ||1/n A_g^* x||_2 <= beta. If t is at least that maximum, s x is such a point for s = min(1, beta / t), and D is concave with
D(0) = 0 (both losses), so D(s x) >= s D(x). The steps below bound D(x) from below and t from above, whatever rounding does:

1. ``dual_point``  squared loss: x is the file's array. Cross-entropy: x off the target is its positive part, and at the target *exactly* minus
   their sum, which is no float: its distance delta is kept.
2. ``value_below``  the conjugates' terms, each with its relative error (NumPy's logarithms are taken to err by 4 units in the last place
   at most), are added exactly (``math.fsum``).
3. ``adjoint``  1/n A_g^* x as nested sums of products, in any order with at most m roundings on the way of any term: the error is at most
   gamma_m 1/n |A|^*|x|, gamma_m = m u / (1 - m u), u = 2^-53, and |A|^* is the same sum with absolute values. Data are first scaled by powers of
   two to entries of at most 1, so that all underflow together stays below ``TINY`` an entry.
4. ``spectral_above``  a bound on ||G||_2^2 = ||G G^T||_2: for any V with ||V^T V - I||_F <= e < 1, ||N||_2 <= ||V^T N V||_2 / (1 - e).

A file is refused if a digest does not fit. Who rewrites a file with all of its digests makes a true statement about other data: compare
the SHA-256 of tokens and targets, which is printed, with that of your own.
"""

import collections
import hashlib
import io
import json
import math
import os
import sys
import zipfile

import numpy as np

U, TINY = 2.0**-53, 2.0**-900
MARK, MEMBERS = "cvxlib proof 1", {"header", "dual", "masks", "tokens", "targets"}
LARGEST_HEADER, LARGEST_MATRIX = 2**16, 2**30
FIELDS = {
    "SelfAttention": "features outputs",
    "CausalSelfAttention": "features outputs",
    "CrossAttention": "features outputs queries",
    "MLPMixer": "tokens features outputs",
    "FNO": "tokens features outputs",
    "BlockFNO": "tokens features outputs blocks",
    "MLP": "features outputs",
    "Convolution": "tokens features outputs kernel",
}
#: bound: what was proved here; claimed: what the file says; statement: both, in two lines
Proof = collections.namedtuple("Proof", "bound claimed statement")
#: of one block: output positions, hidden entries, columns of R_X, entries of u, blocks, how often tokens are multiplied
Sizes = collections.namedtuple("Sizes", "a h w p blocks degree")


class Refused(ValueError):
    """Why a file proves nothing."""


def demand(condition, sentence):
    if not condition:
        raise Refused(sentence)


def read_array(data, name):
    """An array from the bytes of an .npy file; nothing is allocated that the bytes do not fill, and nothing is unpickled."""
    stream = io.BytesIO(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(stream)](stream)
    demand(not dtype.hasobject and dtype.kind in "fiu", f"{name} is not an array of plain numbers")
    left = len(data) - stream.tell()
    demand(math.prod(shape) * dtype.itemsize == left, f"{name} does not hold what its shape says")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")


def fingerprint(array):
    """SHA-256 of dtype, shape and entries."""
    words = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(words + np.ascontiguousarray(array).tobytes()).hexdigest()


def read_file(path):
    """The header and the arrays of a proof file: an uncompressed .npz, so that it is no larger in memory than on disk."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        demand({"header"} < set(members) <= MEMBERS, "the file is not a proof file")
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in members.values())
        demand(stored and sum(i.file_size for i in members.values()) <= os.path.getsize(path), "the file is compressed")
        demand(members["header"].file_size <= LARGEST_HEADER, "the header is too long")
        arrays = {name: read_array(archive.read(info), name) for name, info in members.items()}
    header = json.loads(arrays.pop("header").tobytes())
    digest = header.pop("digest")
    demand(header["format"] == MARK, f"the file is of the form {header['format']!r}, and this checker reads {MARK!r}")
    told = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    demand(digest == told, "the header was changed after it was written")
    return header, arrays


def sizes_of(mixer, s, d):
    """The sizes of a mixer on tokens (n, s, d)."""
    name, given = mixer["name"], {key: value for key, value in mixer.items() if key != "name"}
    demand(set(given) == set(FIELDS[name].split()), f"the sizes do not fit the mixer {name}")
    demand(all(type(v) is int and 0 < v < 2**31 for v in given.values()), "a size is no positive whole number")
    demand((given.get("tokens", s), given.get("features", d)) == (s, d), "the tokens do not fit the mixer")
    blocks = given.get("blocks", 1)
    demand(d % blocks == given["outputs"] % blocks == 0, "the blocks do not divide features and outputs")
    if "Attention" in name:
        queries = given.get("queries", s)
        keys = s - queries if "queries" in given else s
        demand(keys > 0, "there are no keys")
        return Sizes(queries, keys, d, d * d, 1, 3)
    if name == "Convolution":
        width = s - given["kernel"] + 1
        demand(width > 0, "the kernel is longer than the tokens")
        return Sizes(1, width, width, given["kernel"] * d, 1, 1)
    if name == "MLPMixer":
        return Sizes(s, d, d, s * s, 1, 1)
    return Sizes(s, 1, 1, d if name == "MLP" else s * d // blocks, blocks, 1)


def adjoint(mixer, x, rho, mask):
    r"""(p, w o) the sum over samples and output positions a of rho[n, a, o] mask[n, a, h] L_X[n, a, h, p] R_X[n, h, w].

    ``x`` (n, s, d) are tokens, ``rho`` is (n, a, o), or (n, 1, o) where it is the same for every a, and ``mask`` is (n, a, h) or None for all ones.
    """
    name, (n, s, d), pooled = mixer["name"], x.shape, rho.shape[1] == 1
    if "Attention" in name:  # u = (k, l), L = q[a, k] y[h, l], R = y[h, w]
        q, y = (x[:, : mixer["queries"]], x[:, mixer["queries"] :]) if name == "CrossAttention" else (x, x)
        if name == "CausalSelfAttention":
            mask = np.tri(s) if mask is None else mask * np.tri(s)
        if mask is None:
            left = q.mT @ np.broadcast_to(rho, (n, q.shape[1], rho.shape[2]))
            return np.tensordot(left, y.mT @ y, (0, 0)).transpose(0, 2, 3, 1).reshape(d * d, -1)  # from (k, o, l, w)
        pairs = (y[..., :, None] * y[..., None, :]).reshape(n, -1, d * d)
        if pooled:
            each = (mask.mT @ q).mT @ pairs  # (n, k, l w)
            return np.tensordot(each, rho[:, 0], (0, 0)).reshape(d * d, -1)
        left = q[..., :, None] * rho[..., None, :]
        total = np.tensordot(left, mask @ pairs, ((0, 1), (0, 1)))  # (k, o, l w)
        return total.reshape(d, -1, d, d).transpose(0, 2, 3, 1).reshape(d * d, -1)
    if name == "MLPMixer":  # u = (a, k), L = x[k, h], R = 1 at h = w
        weights = (np.ones((n, 1, d)) if mask is None else mask)[..., None] * rho[:, :, None]
        total = x.transpose(2, 1, 0) @ weights.transpose(1, 2, 0, 3)  # (a or 1, w, k, o)
        return np.broadcast_to(total.transpose(0, 2, 1, 3), (s, s, d, rho.shape[2])).reshape(s * s, -1)
    if name == "Convolution":  # u = (t, d), L = x[h + t], R = 1 at h = w
        kernel, width = mixer["kernel"], s - mixer["kernel"] + 1
        rows = x[:, np.arange(width)[:, None] + np.arange(kernel)].reshape(n, width, -1)
        weights = np.broadcast_to(rho if mask is None else mask.mT * rho, (n, width, rho.shape[2]))
        total = rows.transpose(1, 2, 0) @ weights.transpose(1, 0, 2)  # (w, p, o)
        return total.transpose(1, 0, 2).reshape(kernel * d, -1)
    shift = (np.arange(s)[:, None] - np.arange(s)) % s  # FNO: u = (k, d), L = x[a - k mod s]; MLP: L = x[a]
    rows = x if name == "MLP" else x[:, shift].reshape(n, s, -1)
    if pooled:
        each = rows.sum(1) if mask is None else (mask.mT @ rows)[:, 0]
        return np.tensordot(each, rho[:, 0], (0, 0))
    return np.tensordot(rows, rho if mask is None else rho * mask, ((0, 1), (0, 1)))


def dual_point(loss, q, targets):
    """The point x as floats, the distance of the exact one, terms of the conjugates, and what their relative errors refer to."""
    if loss == "SquaredLoss":
        return q, np.zeros_like(q), q * (q / 2 + targets), np.abs(q) * (np.abs(q) / 2 + np.abs(targets))
    c = q.shape[1]
    target, slack = targets[:, None] == np.arange(c), (c + 4) * U
    off = np.where(target, 0, np.maximum(q, 0))
    total = off.sum(1, keepdims=True)
    off = np.where(total > 1 - 4 * slack, off * ((1 - 4 * slack) / np.maximum(total, 0.5)), off)
    total = off.sum(1, keepdims=True)  # exact to the factor 1 +- c u, and at most 1 exactly
    entropy = off * np.log(np.where(off > 0, off, 1))
    ends = np.concatenate([np.minimum(total * (1 + slack), 1), total * (1 - slack)], 1)
    ends = (1 - ends) * np.log1p(-np.where(ends < 1, ends, 0))  # convex between: the larger end is above the exact one
    terms = np.where(target, ends.max(1, keepdims=True), entropy)
    scale = np.where(target, np.abs(ends).max(1, keepdims=True), np.abs(entropy))
    return np.where(target, -total, off), np.where(target, slack * total, 0), terms, scale


def value_below(terms, scale, n):
    """A number that D(x), minus the mean of the conjugates, does not fall below."""
    above = math.fsum(terms.ravel()) + 32 * U * math.fsum(scale.ravel()) + TINY
    return math.nextafter(-math.nextafter(above, math.inf) / n, -math.inf)


def spectral_above(g):
    """A number that the spectral norm of a matrix with entries of at most about 1 does not exceed."""
    shift = math.frexp(np.abs(g).max())[1]
    g = np.ldexp(g if len(g) <= g.shape[1] else g.T, -shift)
    r, length = g.shape
    gram = g @ g.T
    v = np.linalg.eigh(gram)[1]
    inner, frobenius = v.T @ gram @ v, np.linalg.norm(gram)
    grow = 1 + 4 * (r * length + r * r + 16) * U  # of the norms and sums below
    away = (np.linalg.norm(v.T @ v - np.eye(r)) + 4 * r * r * U) * grow
    rest = (np.linalg.norm(inner - np.diag(np.diag(inner))) + 8 * r * r * U * frobenius) * grow
    square = (np.abs(np.diag(inner)).max() + rest) * (1 + 8 * U) / (1 - away) + 2 * length * U * np.linalg.norm(
        g
    ) ** 2 * grow
    known = away < 0.5 and np.linalg.norm(v) ** 2 < 2 * r and math.isfinite(square)
    return math.ldexp((math.sqrt(square) + TINY) * (1 + 8 * U), shift) if known else math.inf


def scaled(array):
    """An array over a power of two that makes its entries at most 1, and the exponent."""
    exponent = math.frexp(np.abs(array).max())[1]
    return np.ldexp(array, -exponent), exponent


def norm_above(header, sizes, x, delta, tokens, masks):
    """A number t that no || 1/n A_g^* x ||_2 exceeds."""
    mixer, pooled, gates = header["mixer"], header["pool"] == "mean", header["gates"]
    n, (a, h, w, p, blocks, degree) = len(tokens), sizes
    o = x.shape[2] // blocks
    demand(p * w * o <= LARGEST_MATRIX, "the lifted matrices are too large for this checker")
    flat = 1 if pooled else a  # rows of a sample that are summed in one go with those of other samples
    step = min(n, max(1, min(512 // flat, 2**22 // ((a + h) * p + p * w + a * w * o))))
    m = a + h + step * flat + n // step + 16
    (tokens, by), (x, of) = scaled(tokens), scaled(x)
    # gamma_m |x| + (1 + gamma_m) delta, doubled to be above all rounding of the second pass
    spread = 2 * m * U * np.abs(x) + 2 * np.ldexp(delta, -of)
    largest = 0.0
    for b in range(blocks):
        seen = np.split(tokens, blocks, 2)[b]
        rho, wide = (np.split(part, blocks, 2)[b] for part in (x, spread))
        for g in range(gates):
            total, around = np.zeros((p, w * o)), np.zeros((p, w * o))
            for i in range(0, n, step):
                k, mask = slice(i, i + step), None
                if masks is not None:
                    mask = np.unpackbits(masks[b, g, k], axis=1, count=a * h).reshape(-1, a, h).astype(float)
                total += adjoint(mixer, seen[k], rho[k], mask)
                around += adjoint(mixer, np.abs(seen[k]), wide[k], mask)
            error = (np.linalg.norm(around) + TINY * p * w * o) * (1 + 4 * p * w * o * U)
            t = (spectral_above(total) + error) / (n * a if pooled else n) * (1 + 8 * U)
            largest = max(largest, t) if math.isfinite(t) else math.inf
    # an exponent out of the range of floats says that nothing can be proved, or that the norm is as good as 0
    return math.nextafter(float(np.ldexp(largest, degree * by + of)), math.inf)


def check(path, tokens=None, targets=None):
    """Prove the bound of a file; tokens and targets are arrays or .npy files where it holds only their SHA-256. Raises :class:`Refused`."""
    try:
        with np.errstate(all="ignore"):
            return prove(*read_file(path), tokens, targets)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"the file does not fit together ({type(error).__name__}: {error})") from None


def prove(header, arrays, tokens, targets):
    """The proof, step by step."""
    for name, given in (("tokens", tokens), ("targets", targets)):
        if given is not None:
            given = given if isinstance(given, np.ndarray) else read_array(open(given, "rb").read(), name)
            arrays.setdefault(name, given)
            demand(fingerprint(given) == header["sha256"][name], f"these are not the {name} that the proof is about")
        demand(name in arrays, f"the file holds only the SHA-256 of its {name}: give them too")
    demand(set(arrays) == set(header["sha256"]), "an array is missing, or one too many")
    for name, array in arrays.items():
        demand(fingerprint(array) == header["sha256"][name], f"{name} was changed after the file was written")
    beta, claimed, gates = float.fromhex(header["beta"]), float.fromhex(header["bound"]), header["gates"]
    demand(0 < beta < math.inf and math.isfinite(claimed), "beta or the bound is no number of use")
    demand(type(gates) is int and gates > 0 and ("masks" in arrays or gates == 1), "the gates do not fit")
    tokens, targets, dual, masks = (arrays.get(k) for k in ("tokens", "targets", "dual", "masks"))
    demand(tokens.dtype in (np.float32, np.float64) and tokens.ndim == 3, "tokens are no (n, s, d) array of floats")
    tokens = tokens.astype(float)
    demand(tokens.size and np.isfinite(tokens).all() and np.isfinite(dual).all(), "tokens or dual are not finite")
    sizes, c, n = sizes_of(header["mixer"], *tokens.shape[1:]), header["mixer"]["outputs"], len(tokens)
    demand(header["pool"] in ("mean", None) and header["loss"] in ("SquaredLoss", "CrossEntropy"), "unknown words")
    rows = (n,) if header["pool"] else (n, sizes.a)
    demand(dual.dtype == np.float64 and dual.shape == (math.prod(rows), c), "the dual point does not fit")
    if header["loss"] == "SquaredLoss":
        demand(targets.dtype.kind == "f" and targets.shape == (*rows, c), "the targets do not fit")
        demand(np.isfinite(targets).all(), "a target is not finite")
        targets = targets.astype(float).reshape(dual.shape)
    else:
        demand(targets.dtype == np.int64 and targets.shape == rows and c > 1, "the targets do not fit")
        targets = targets.reshape(-1)
        demand(0 <= targets.min() <= targets.max() < c, "a target is no class")
    if masks is not None:
        shape = (sizes.blocks, gates, n, -(-sizes.a * sizes.h // 8))
        demand(masks.dtype == np.uint8 and masks.shape == shape, "the masks do not fit")

    x, delta, terms, scale = dual_point(header["loss"], dual, targets)
    value = value_below(terms, scale, n) if np.isfinite(scale).all() else -math.inf
    x, delta = (part.reshape(n, -1, c) for part in (x, delta))
    t = norm_above(header, sizes, x, delta, tokens, masks)
    s = 1.0 if t <= beta else math.nextafter(beta / t, 0)
    bound = s * value if s == 1 or not s * value > 0 else math.nextafter(s * value, 0)
    bound = bound if bound > 0 else 0.0  # no loss is negative

    excess = claimed - bound
    demand(excess <= 1e-9 * abs(claimed), f"the file says {claimed!r}, and no more than {bound!r} can be proved")
    names = ", ".join(f"{key}={value}" for key, value in header["mixer"].items() if key != "name")
    form = f"{header['mixer']['name']}({names}), {'linear' if masks is None else f'{gates} gates as stored'}"
    form += f", {header['loss']}, pool {header['pool']}, beta {beta!r}"
    data = ", ".join(f"{key} {header['sha256'][key]}" for key in ("tokens", "targets"))
    first = f"PROVED: no head of this form ({form}) can have an objective below {bound!r} ({bound.hex()})"
    return Proof(
        bound,
        claimed,
        f"{first}\nThe file says {claimed!r} ({header['level']}), recomputed {bound!r}; SHA-256 of {data}",
    )


def main(arguments):
    if len(arguments) not in (1, 3):
        print("usage: verify.py FILE [TOKENS.npy TARGETS.npy]", file=sys.stderr)
        return 2
    try:
        print(check(*arguments).statement)
    except Refused as refusal:
        print(f"REFUSED: {refusal}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Philox4x32-7: the counter-based random bits behind dropout.

A bit is a pure function of (seed, site, step, logical element), so that nothing is stored between the
forward and the backward pass, every implementation draws the same bits, and no tile or thread shape shows in
the result.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds are the fewest
that the paper found to pass BigCrush; dropout needs no margin beyond that, and the rounds are what it costs.
"""

import jax
import jax.numpy as jnp

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1: the Weyl sequence of the keys
BITS_PER_DRAW = 16  # bits that decide one element
DRAWS_PER_BLOCK = 8  # elements decided by one 128-bit Philox block


def philox4x32(
    counter: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    key: tuple[jax.Array, jax.Array],
    rounds: int = ROUNDS,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Four uint32 words for each counter. All arrays are uint32, of one shape or scalar."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = map(jnp.uint32, MULTIPLIERS)
    for _ in range(rounds):
        hi0, lo0 = _multiply(c0, m0)
        hi1, lo1 = _multiply(c2, m1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + jnp.uint32(KEY_INCREMENTS[0]), k1 + jnp.uint32(KEY_INCREMENTS[1])
    return c0, c1, c2, c3


def _multiply(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) words of the product of two uint32 numbers.

    jax.lax.mulhi says the same, but on the CPU it does not compile under shard_map (jax 0.10 and 0.11).
    """
    with jax.enable_x64(True):
        product = a.astype(jnp.uint64) * b.astype(jnp.uint64)
        return (product >> jnp.uint64(32)).astype(jnp.uint32), product.astype(jnp.uint32)


SITES = 2**32  # of one grid; the rest of a site's 64 bits is where the grid begins


def site_at(site: int, first: int) -> int:
    """The site of a grid that is a part of a larger one: its rows begin at row `first` of that, and draw its bits.

    Of a grid of several matrices, `first` is the number of a matrix. A device that has some of a batch's rows so drops
    what one device with all of them would.

    Raises ValueError if either is no 32-bit number.
    """
    if not (0 <= site < SITES and 0 <= first < SITES):
        raise ValueError(f"a dropout site and its first row must be in [0, 2**32), found {site} and {first}")
    return first * SITES + site


def split_site(site: int) -> tuple[int, int]:
    """(site, first) of `site_at`."""
    return site % SITES, site // SITES


def random_uint16(rng: jax.Array, site: int, shape: tuple[int, int, int], first: tuple[int, int] = (0, 0)) -> jax.Array:
    """16 random bits for each element of the logical grid (batch, row, column), as uint32 in [0, 65536).

    Args:
      rng: uint32 (2,): the run's seed and the step.
      site: which use of the bits this is (dropout site and layer); part of the key.
      shape: (batch, rows, columns).
      first: numbers of the first of the batch and of the first row, where the grid is a part of a larger one.

    One Philox block with counter (column // 8, row, batch, step) and key (seed, site) decides eight
    neighbouring columns: column 8i + 2w + h takes half h (0 = low) of word w.
    """
    batch, rows, columns = shape
    blocks = -(-columns // DRAWS_PER_BLOCK)
    grid = (batch, rows, blocks)

    def numbers(axis: int, start: int) -> jax.Array:
        counted = jax.lax.broadcasted_iota(jnp.uint32, grid, axis)
        return counted + jnp.uint32(start) if start else counted

    counter = (numbers(2, 0), numbers(1, first[1]), numbers(0, first[0]), jnp.broadcast_to(rng[1], grid))
    words = philox4x32(counter, (rng[0], jnp.uint32(site)))
    # The barrier keeps XLA from computing a whole block again for each of the eight elements it decides.
    words = jax.lax.optimization_barrier(words)
    halves = [half for word in words for half in (word & jnp.uint32(0xFFFF), word >> 16)]
    return jnp.stack(halves, axis=-1).reshape(batch, rows, blocks * DRAWS_PER_BLOCK)[:, :, :columns]

"""The picture of a run's losses: a PNG, read back chunk by chunk, with the curve in it."""

import zlib

import numpy as np
import pytest

from edgeq.train import picture


@pytest.mark.parametrize("losses", [[2.5], [3.0, 3.0], list(np.geomspace(900, 0.001, 50))])
def test_the_file_holds_the_pixels(losses, tmp_path):
    picture.write(tmp_path / "loss.png", losses)
    data = (tmp_path / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        named, check = data[at + 4 : at + 8 + size], data[at + 8 + size : at + 12 + size]
        assert zlib.crc32(named) == int.from_bytes(check, "big")
        chunks[named[:4]] = named[4:]
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    sizes = [int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4)]
    assert sizes == [picture.WIDTH, picture.HEIGHT]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(picture.HEIGHT, -1)
    assert not rows[:, 0].any()
    np.testing.assert_array_equal(rows[:, 1:], picture.draw(losses))


def test_losses_that_fall_are_a_line_that_falls():
    pixels = picture.draw(np.linspace(5, 1, 200).tolist())
    rows = [np.flatnonzero(column == picture.LINE).mean() for column in pixels.T[picture.LEFT : -24]]
    assert (np.diff(rows) >= 0).all()
    assert rows[-1] - rows[0] > 200

"""An extractor in the place of the real one: pages say how it breaks down. `python broken_extractor.py` is given what extracting.py is."""

import os
import signal
import sys
import time

from megatrain.corpus.reading.extracting import serve


def extract(page):
    text = page.decode()
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "exit":
        os._exit(7)
    if text == "loop":
        while True:
            pass
    if text == "sleep":
        time.sleep(600)
    if text == "memory":
        return "", " " * (4 << 30)
    if text == "raise":
        raise ValueError("no\nsuch page")
    if text == "pid":
        return str(os.getppid()), str(os.getpid())
    if text.startswith("leak"):
        extract.kept = bytearray(40 << 20), getattr(extract, "kept", None)
    print("noise")
    return "title of " + text, text.upper()


serve(extract, float(sys.argv[-2]), int(sys.argv[-1]))

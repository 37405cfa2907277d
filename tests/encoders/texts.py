"""Real text that every Python brings along: what its standard library says about itself."""

import importlib
import inspect

MODULES = (
    "argparse asyncio calendar collections concurrent.futures configparser contextlib copy csv datetime decimal "
    "difflib email.message fractions functools glob gzip heapq html http.client inspect ipaddress json locale "
    "logging mailbox multiprocessing.pool os pathlib pickle queue random re sched shutil smtplib socket sqlite3 "
    "statistics string subprocess tarfile tempfile textwrap threading tokenize traceback unittest urllib.parse "
    "urllib.request uuid wave weakref xml.dom.minidom zipfile"
)


def titles_and_bodies():
    """Pairs of a docstring's first line and the rest of it."""
    pairs = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        for _, thing in sorted(vars(module).items(), key=lambda item: item[0]):
            if getattr(thing, "__module__", None) != name or not (inspect.isfunction(thing) or inspect.isclass(thing)):
                continue
            title, _, body = (inspect.getdoc(thing) or "").partition("\n")
            if len(title) > 20 and len(body) > 80:
                pairs.append((title.strip(), " ".join(body.split())))
    return pairs

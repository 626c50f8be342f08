"""What commands show and write: tables, figures, pages, traces."""

import logging

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a cache of fonts that cannot be kept is no news

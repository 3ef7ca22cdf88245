"""The kinds of data sets that there are. A new one is a file beside this one, and a line here."""

# data.backend -> the module whose `open_split(config, split, key)` gives an ImageSource: the images that the data set
# at data.path has under the name `split`, which the config's key `key` gave. It is imported when it is asked for.
SOURCES = {
    "folder": "vqgan_accel.data.folder",
    "hub": "vqgan_accel.data.hub",
    "ffcv": "vqgan_accel.data.beton",  # which training alone reads with FFCV's own loader: data/ffcv.py
    "beton": "vqgan_accel.data.beton",
}

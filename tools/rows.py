"""What is known of each image once it is encoded, and where its data lies in the output: numpy rows, as a million
Python objects would take a GiB."""

import numpy as np

ROW = np.dtype(
    [
        ("index", "<i8"),  # the image's entry in its data set
        ("label", "<i8"),  # -1 where unknown
        ("length", "<i8"),  # bytes of its data; 0 where it is left out
        ("crc32", "<u4"),  # of its data, as zlib, gzip, zip and PNG define it
        ("mode", "u1"),  # pipelines.beton.JPG or RAW
        ("kind", "u1"),  # of the image file: an entry of SUFFIXES
        ("changes", "<u2"),  # a bit for each rule of tools.encode.RULES that was applied
        ("size", "<i4", (2,)),  # height, width of the image in the data
        ("original", "<i4", (2,)),  # height, width before any resizing
        ("stamp", "<i8", (2,)),  # of the source, see ImageSet.stamp
    ]
)
PLACE = np.dtype([("file", "<i4"), ("offset", "<i8")])  # number of the output file, first byte of the data in it
SUFFIXES = (".jpg", ".png", ".webp", ".bmp", ".tif")

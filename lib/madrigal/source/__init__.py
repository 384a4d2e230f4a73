"""Where images come from: a URL or a path is opened, read once, unpacked and checked on the way.

`schemes.open` opens one, `stream.fetch` reads it whole, `size.virtual_size` says how large an image would be,
`download.downloaded` makes it a file.  A scheme is one module of `scheme`.
"""

"""The formats of the official RAE releases and of diffusers (spec 1.3, 7.1 to 7.5, II.2), as pure mappings.

Each function turns names, shapes or layouts into ours, or back, and passes on what it does not know, so that
a strict comparison names whatever is left over. Nothing here touches a file or builds a network:
`raekit.conversion` does.
"""

"""Hostile and broken checkpoints, made by code: each must be refused in words, or read as exactly what it holds.

    for case in all_cases():
        path = case.make(folder)        # writes the file; payloads would create folder/"marker"
        case.read(path)                 # SurgeryError matching case.refused, or the weights case.values

Where a case comes from a published weakness of another reader, its name says which construction it uses.
"""

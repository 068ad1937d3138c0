"""Checkpoints that lie elsewhere: buckets, web servers, the Hugging Face hub.

folder = mirror.folder_of("s3://bucket/Llama-2-7b")     # names and small files here, weights read where they lie

address.py    URLs, and which public one is which bucket     store.py     one client for all of them, errors in words
listing.py    what lies at an address                        remote.py    ranges of one version of an object
mirror.py     a folder that stands for an address            hub_repo.py  repositories of the hub
copies.py     what is needed on this machine as a whole      refusals.py  what stores answer when they refuse

contents.py   what a folder holds, in which order        push.py        the folder becomes objects of a bucket
claim.py      a prefix for one push at a time            upload.py      a file becomes an object, and is compared
multipart.py  parts that a killed push has sent   published.py   records without the paths of this machine
together.py  a few at a time, until one fails

pull.py       what lies at an address into a folder      landing.py     the hidden folder it comes into first
proof.py      digests that stores tell

hub_push.py   the folder becomes a commit of the hub     card.py        a model card, made from surgery.json
outgoing.py   outputs whose destination is an address        streamed.py  those larger than the disk
"""

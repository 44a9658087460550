"""Sequences: a request's tokens, text and drafts in the engine, and the steps that compute them.

A sequence owns its state; the detokenizer and the drafter read its tokens.
"""

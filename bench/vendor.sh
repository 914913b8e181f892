#!/bin/sh
# Fetch the libraries of the chat window's page from npm, at the versions below, with their licences.
set -eu
to=$PWD/python/mixkvq/server/window/page/vendor
from=$(mktemp -d)
trap 'rm -rf "$from"' EXIT
cd "$from"
npm install --silent --no-audit --no-fund --ignore-scripts \
    markdown-it@15.0.3 markdown-it-texmath@1.0.0 temml@0.13.5 dompurify@3.5.0 @highlightjs/cdn-assets@11.12.0
cd node_modules
cp markdown-it/dist/browser/markdown-it.umd.min.js "$to/markdown-it.min.js"
cp markdown-it/LICENSE "$to/markdown-it.LICENSE"
cp markdown-it-texmath/texmath.js "$to/texmath.js"
cp markdown-it-texmath/license.txt "$to/texmath.LICENSE"
cp temml/dist/temml.min.js temml/dist/Temml.woff2 "$to/"
cp temml/dist/Temml-Local.css "$to/temml.css"
cp temml/LICENSE "$to/temml.LICENSE"
cp dompurify/dist/purify.min.js "$to/"
cp dompurify/LICENSE "$to/dompurify.LICENSE"
cp @highlightjs/cdn-assets/highlight.min.js "$to/"
cp @highlightjs/cdn-assets/LICENSE "$to/highlight.LICENSE"
sed -i '/^\/\/# sourceMappingURL=/d' "$to"/*.js
chmod 644 "$to"/*

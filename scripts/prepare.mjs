#!/usr/bin/env node
// npm runs this after `npm ci`, before `npm pack`, and for `npm install -g .`. Only the last one needs
// something: it links to this directory without installing or building anything in it.
import { createRequire } from 'node:module';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';

if (process.env['npm_config_global'] === 'true') {
  const root = dirname(dirname(fileURLToPath(import.meta.url)));
  const { isReady, setUp } = createRequire(import.meta.url)('../bin/setup.js');
  if (!isReady(root)) setUp(root);
}

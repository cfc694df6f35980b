#!/usr/bin/env node
// Holds the direction of imports and the places that may touch clock, randomness and output:
//
//   cli → commands/run → engines → repo, devices → format → base        ui → base
//   commands (the data, loaded at every start) → base only; ui: types only
//
// repo and devices never import each other; format is pure bytes. Type-only imports count as well, with
// the one exception above. Cycles, console, Date.now and Math.random are oxlint's.
//
// usage: check-layers.mjs [root]
import { readFileSync, readdirSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = resolve(process.argv[2] ?? dirname(dirname(fileURLToPath(import.meta.url))));
const src = join(root, 'src');

/** Layer → layers it may import (itself always). */
const MAY = {
  base: [],
  format: ['base'],
  repo: ['format', 'base'],
  devices: ['format', 'base'],
  engine: ['repo', 'devices', 'format', 'base'],
  ui: ['base'],
  commands: ['base'],
  'commands/run': ['commands', 'engine', 'repo', 'devices', 'format', 'ui', 'base'],
  cli: ['commands', 'ui', 'base'],
};
/** Also allowed as `import type`. */
const MAY_TYPE = { commands: ['ui'] };

function layerOf(file) {
  const parts = file.split('/');
  if (parts.length === 1) return file === 'cli.ts' ? 'cli' : 'base';
  const folder = parts[0];
  if (folder === 'commands') return parts[1] === 'run' ? 'commands/run' : 'commands';
  return ['format', 'repo', 'devices', 'ui'].includes(folder) ? folder : 'engine';
}

/** Packages and Node modules that belong to certain layers. */
const PACKAGES = [
  [/^(chalk|ora|ink|react)(\/|$)/, ['ui', 'commands/run']],
  [/^commander(\/|$)/, ['cli']],
  [/^sqlite3(\/|$)/, ['repo']],
];
const IMPURE =
  /^node:(fs|child_process|process|os|net|http|https|dgram|tls|worker_threads|timers|perf_hooks|readline)(\/|$)/;

/** Text that no file but the named ones may contain, after comments and strings are taken out. */
const WORDS = [
  {
    pattern: /\bnew Date\(\s*\)/,
    message: 'new Date() reads the clock: take a Clock',
    only: /^clock\.ts$/,
  },
  {
    pattern: /\bperformance\.now\b/,
    message: 'performance.now: take a Clock',
    only: /^clock\.ts$/,
  },
  { pattern: /\bprocess\.hrtime\b/, message: 'process.hrtime: take a Clock', only: /^clock\.ts$/ },
  {
    pattern: /\brandom(Bytes|UUID|Int|Fill|FillSync)\b/,
    message: 'randomness: take a Random (src/clock.ts)',
    only: /^clock\.ts$/,
  },
  {
    pattern: /\bprocess\.(stdout|stderr)\b/,
    message: 'only src/ui and src/cli.ts write to stdout and stderr',
    only: /^(cli\.ts$|ui\/)/,
  },
  { pattern: /\bprocess\.exit\b/, message: 'only src/cli.ts ends the process', only: /^cli\.ts$/ },
];

function withoutComments(text) {
  return text.replace(
    /\/\*[\s\S]*?\*\/|\/\/[^\n]*|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"/g,
    (match) => (match.startsWith('/') ? match.replace(/[^\n]/g, ' ') : match),
  );
}

const withoutStrings = (text) => text.replace(/'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"/g, "''");

/** Every import of a file: specifier, whether only types come from it, whether it is loaded lazily. */
function* importsOf(text) {
  const statement = /\b(?:import|export)\s+(type\s+)?(?:[\w$*\s{},]*?\bfrom\s*)?['"]([^'"]+)['"]/g;
  for (const match of text.matchAll(statement)) {
    yield {
      specifier: match[2],
      isType: match[1] !== undefined,
      isLazy: false,
      index: match.index,
    };
  }
  for (const match of text.matchAll(/\bimport\(\s*['"]([^'"]+)['"]\s*\)/g)) {
    yield { specifier: match[1], isType: false, isLazy: true, index: match.index };
  }
}

const problems = [];
for (const entry of readdirSync(src, { recursive: true })) {
  const file = entry.split('\\').join('/');
  if (!/\.tsx?$/.test(file) || file.endsWith('.d.ts')) continue;
  const text = withoutComments(readFileSync(join(src, file), 'utf8'));
  const layer = layerOf(file);
  const at = (index) => `src/${file}:${text.slice(0, index).split('\n').length}`;
  for (const { specifier, isType, isLazy, index } of importsOf(text)) {
    if (specifier.startsWith('.')) {
      const target = relative(src, resolve(dirname(join(src, file)), specifier))
        .split('\\')
        .join('/');
      if (target.startsWith('..')) {
        problems.push(`${at(index)}: ${specifier} is outside src`);
        continue;
      }
      const to = layerOf(target.replace(/\.js$/, '.ts'));
      const isLoad = layer === 'commands' && to === 'commands/run' && isLazy;
      const allowed =
        to === layer ||
        isLoad ||
        MAY[layer].includes(to) ||
        (isType && MAY_TYPE[layer]?.includes(to));
      if (!allowed) problems.push(`${at(index)}: ${layer} must not import ${to} (${specifier})`);
    } else {
      for (const [pattern, layers] of PACKAGES) {
        if (pattern.test(specifier) && !layers.includes(layer)) {
          problems.push(`${at(index)}: ${specifier} belongs to ${layers.join(' and ')}`);
        }
      }
      if (layer === 'format' && IMPURE.test(specifier)) {
        problems.push(`${at(index)}: format is pure bytes and must not import ${specifier}`);
      }
    }
  }
  const code = withoutStrings(text);
  for (const { pattern, message, only } of WORDS) {
    const found = only.test(file) ? null : pattern.exec(code);
    if (found !== null) {
      const line = code.slice(0, found.index).split('\n').length;
      problems.push(`src/${file}:${line}: ${message}`);
    }
  }
  const processUse = layer === 'format' ? /\bprocess\./.exec(code) : null;
  if (processUse !== null) {
    const line = code.slice(0, processUse.index).split('\n').length;
    problems.push(`src/${file}:${line}: format is pure bytes and must not use process`);
  }
}
for (const problem of problems) console.error(problem);
process.exitCode = problems.length === 0 ? 0 : 1;

// Puts what tsc has compiled into few files that load fast: bin/b2 runs these. Modules of several entries are in chunks; packages stay
// where npm put them, all but commander, which every command needs.
//
// What is in the directory: chunks/ the program, CommonJS; NAME.js for the program (cli.js) and everything that is started as a file
// (threads and helper processes), which load their chunk through bin/load.js; ui/dashboard.mjs, an ES module with all that it needs
// because its packages can only be imported; code/ what scripts/code-cache.mjs adds.
import { mkdirSync, writeFileSync } from 'node:fs';
import { basename, dirname, join, relative, sep } from 'node:path';
import { rolldown } from 'rolldown';

/** Started as files, by `new URL('./NAME.js', import.meta.url)`. A unit test compares this with the sources. */
export const STARTED = [
  'capture/freeze/helper',
  'capture/scan-worker',
  'files/agent',
  'mount/reader-worker',
  'repo/decode-worker',
  'restore/worker',
  'tape/worker',
  'verify/data-worker',
];
const DASHBOARD = 'ui/dashboard';
/** Entries (commands, threads, helper processes) that a module is for to be in the chunk of what most need. */
const MANY_ENTRIES = 14;
/** Packages that are bundled. */
const BUNDLED = /^commander$/;

const isOwn = (id) => id.startsWith('.') || id.startsWith('/');
const isExternal = (id) => !isOwn(id) && !BUNDLED.test(id);

function warn(warning) {
  console.error(`bundle: ${warning.message}`);
}

/**
 * `import.meta.url` of a module stands for the place where it would be if the bundle had its file: paths relative to it (workers, the
 * package, bin/b2) are the same in `dist`. Packages are found from anywhere in it.
 */
function moduleUrls(dist) {
  return {
    name: 'module-urls',
    transform(code, id) {
      if (!id.startsWith(`${dist}${sep}`) || !code.includes('import.meta.url')) return undefined;
      const place = JSON.stringify(relative(dist, id));
      return code
        .replaceAll('createRequire(import.meta.url)', 'b2Require')
        .replaceAll('import.meta.url', `b2UrlOf(${place})`);
    },
  };
}

/** What is in front of each chunk; its last lines where they are used. */
const STRICT = "'use strict';\n";
const REQUIRE = 'const b2Require = require;\n';
const URL_OF =
  "const b2UrlOf = (place) => require('url').pathToFileURL(require('path').join(__dirname, '..', place)).href;\n";

/** The text of a chunk as it is written. */
function finished(code) {
  const head = [
    STRICT,
    ...(code.includes('b2Require') ? [REQUIRE] : []),
    ...(code.includes('b2UrlOf') ? [URL_OF] : []),
  ].join('');
  // A script that was compiled by hand may not import; bin/load.js does it then.
  return `${head}${code.replaceAll(
    /\bimport\(("[^"]+"|'[^']+')\)/g,
    "require('../../bin/load.js').imported($1, __dirname)",
  )}`;
}

/** Bundles the modules in `dist` into the directory `out`, which is made. */
export async function bundle(dist, out) {
  const dashboard = join(dist, `${DASHBOARD}.js`);
  const entries = ['cli', ...STARTED];
  const program = await rolldown({
    input: Object.fromEntries(entries.map((name) => [name, join(dist, `${name}.js`)])),
    platform: 'node',
    onwarn: warn,
    experimental: { attachDebugInfo: 'none' },
    external: (id) => isExternal(id) || id === dashboard,
    plugins: [
      {
        name: 'dashboard',
        resolveId: (id) =>
          basename(id) === `${basename(DASHBOARD)}.js`
            ? { id: `../${DASHBOARD}.mjs`, external: true }
            : undefined,
      },
      moduleUrls(dist),
    ],
  });
  const { output } = await program.generate({
    format: 'cjs',
    exports: 'named',
    entryFileNames: (chunk) => `chunks/${chunk.name.replaceAll('/', '-')}-[hash].js`,
    chunkFileNames: 'chunks/[name]-[hash].js',
    hashCharacters: 'hex',
    // What most commands need is in one file: to open and read one takes as long as to run ten modules.
    codeSplitting: { groups: [{ name: 'core', minShareCount: MANY_ENTRIES }] },
  });
  await program.close();
  mkdirSync(join(out, 'chunks'), { recursive: true });
  for (const chunk of output) {
    writeFileSync(join(out, chunk.fileName), finished(chunk.code));
    if (!chunk.isEntry) continue;
    const name = relative(dist, chunk.facadeModuleId);
    const up = relative(dirname(join(out, name)), out) || '.';
    mkdirSync(dirname(join(out, name)), { recursive: true });
    writeFileSync(
      join(out, name),
      `'use strict';\nconst { join } = require('path');\nmodule.exports = require('${up}/../bin/load.js').load(join(__dirname, '${up}'), '${basename(chunk.fileName)}');\n`,
    );
  }
  writeFileSync(join(out, 'package.json'), '{ "type": "commonjs" }\n');

  const screen = await rolldown({
    input: dashboard,
    platform: 'node',
    onwarn: warn,
    experimental: { attachDebugInfo: 'none' },
    external: isExternal,
  });
  await screen.write({ file: join(out, `${DASHBOARD}.mjs`), format: 'es' });
  await screen.close();
}

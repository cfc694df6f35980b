/**
 * Compiles modules of src/ to JavaScript, for tests that need them in a process of their own (Node 20 runs no
 * TypeScript, and dist/ may be missing or old).
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const PROJECT = fileURLToPath(new URL('../..', import.meta.url));

/** As in tsconfig.json, which tsc does not read when it is given files. */
const OPTIONS = (
  '--ignoreConfig --target es2023 --lib es2023,esnext.disposable --module nodenext --types node ' +
  '--strict --skipLibCheck --jsx react-jsx'
).split(' ');

/**
 * Compiles `sources` (below src/, as `repo/store-directory.ts`) and what they import into one new directory, and
 * returns it; `repo/store-directory.js` is in it then. The caller removes it. It lies in node_modules/.cache so
 * that packages resolve.
 */
export function compileForChild(...sources: readonly string[]): string {
  const cache = path.join(PROJECT, 'node_modules/.cache/b2');
  mkdirSync(cache, { recursive: true });
  const directory = mkdtempSync(path.join(cache, 'child-'));
  const done = spawnSync(
    process.execPath,
    [
      path.join(PROJECT, 'node_modules/typescript/bin/tsc'),
      ...OPTIONS,
      '--rootDir',
      path.join(PROJECT, 'src'),
      '--outDir',
      directory,
      ...sources.map((source) => path.join(PROJECT, 'src', source)),
    ],
    { cwd: PROJECT, encoding: 'utf8' },
  );
  for (const source of sources) {
    const file = path.join(directory, source.replace(/\.tsx?$/, '.js'));
    if (!existsSync(file)) throw new Error(`tsc made no ${file}: ${done.stdout}${done.stderr}`);
  }
  return directory;
}

/** The rules that hold the layers must really hold them: each is broken here once. */
import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { tempDir } from '../support/tmp.js';

const root = fileURLToPath(new URL('../../', import.meta.url));

type Files = Readonly<Record<string, string>>;

function project(files: Files) {
  const dir = tempDir();
  for (const [name, text] of Object.entries(files)) {
    mkdirSync(dirname(dir.join('src', name)), { recursive: true });
    writeFileSync(dir.join('src', name), text);
  }
  return dir;
}

async function layerProblems(files: Files): Promise<string> {
  await using dir = project(files);
  const done = spawnSync(process.execPath, [join(root, 'scripts/check-layers.mjs'), dir.path], {
    encoding: 'utf8',
  });
  expect(done.status).toBe(done.stderr === '' ? 0 : 1);
  return done.stderr;
}

describe('check-layers', () => {
  it.each([
    ['repo/a.ts', "import { x } from '../devices/b.js';", 'repo must not import devices'],
    ['devices/a.ts', "import { x } from '../repo/b.js';", 'devices must not import repo'],
    ['devices/a.ts', "export * from '../repo/b.js';", 'devices must not import repo'],
    ['format/a.ts', "import type { X } from '../repo/b.js';", 'format must not import repo'],
    ['format/a.ts', "import { open } from 'node:fs/promises';", 'format is pure bytes'],
    ['format/a.ts', 'export const x = process.env;', 'format is pure bytes'],
    ['clock2.ts', "import { x } from './format/a.js';", 'base must not import format'],
    ['capture/a.ts', "import { x } from '../ui/table.js';", 'engine must not import ui'],
    ['capture/a.ts', "import { x } from '../commands/spec.js';", 'engine must not import commands'],
    ['commands/a.ts', "import { x } from '../capture/a.js';", 'commands must not import engine'],
    [
      'commands/a.ts',
      "import {\n  x,\n} from './run/a.js';",
      'commands must not import commands/run',
    ],
    [
      'commands/a.ts',
      "const m = () => import('../capture/a.js');",
      'commands must not import engine',
    ],
    ['ui/a.ts', "import { x } from '../repo/a.js';", 'ui must not import repo'],
    ['repo/a.ts', "import x from 'chalk';", 'chalk belongs to ui'],
    ['repo/a.ts', "import x from 'commander';", 'commander belongs to cli'],
    ['capture/a.ts', "import x from 'sqlite3';", 'sqlite3 belongs to repo'],
    ['repo/a.ts', "import x from '../../test/x.js';", 'outside src'],
    ['repo/a.ts', 'export const x = new Date();', 'take a Clock'],
    ['repo/a.ts', 'export const x = process.hrtime.bigint();', 'take a Clock'],
    ['repo/a.ts', "import { randomBytes } from 'node:crypto';", 'take a Random'],
    ['capture/a.ts', "process.stdout.write('x');", 'only src/ui and src/cli.ts write'],
    ['capture/a.ts', 'process.exit(1);', 'only src/cli.ts ends the process'],
  ])('%s: %s', async (file, text, message) => {
    const problems = await layerProblems({ [file]: `\n${text}\n` });
    expect(problems).toContain(`src/${file}:2: `);
    expect(problems).toContain(message);
  });

  it('has nothing against what is allowed', async () => {
    expect(
      await layerProblems({
        'cli.ts':
          "import { x } from './commands/index.js';\nimport y from 'commander';\nprocess.exit(1);",
        'commands/a.ts':
          "import type { S } from '../ui/style.js';\nconst l = () => import('./run/a.js');",
        'commands/run/a.ts':
          "import { x } from '../../capture/a.js';\nimport { y } from '../../ui/table.js';",
        'capture/a.ts': "import { x } from '../repo/a.js';\nimport { y } from '../devices/a.js';",
        'repo/a.ts':
          "import { x } from '../format/a.js';\n// new Date() and process.exit\nconst s = 'process.exit';",
        'format/a.ts': "import { x } from '../errors.js';\nexport const d = new Date(5);",
        'clock.ts': 'export const x = new Date();',
      }),
    ).toBe('');
  });
});

describe('oxlint', () => {
  it.each([
    ['repo/a.ts', 'export const x = Date.now();', 'no-restricted-properties'],
    ['repo/a.ts', 'export const x = Math.random();', 'no-restricted-properties'],
    ['repo/a.ts', "console.log('x');", 'no-console'],
    ['repo/a.ts', 'async function f() {}\nexport function g() { f(); }', 'no-floating-promises'],
    ['repo/a.ts', 'export function f(x: any) { return x; }', 'no-explicit-any'],
    ['repo/a.ts', '// @ts-ignore\nexport const x: number = 5;', 'ban-ts-comment'],
    [
      'repo/a.ts',
      "export function f(x: 'a' | 'b') { switch (x) { case 'a': return 1; } return 2; }",
      'switch-exhaustiveness-check',
    ],
    ['repo/a.ts', "import './b.js';\nexport const x = 1;", 'no-cycle'],
    ['repo/a.ts', 'export default 5;', 'no-default-export'],
  ])('%s: %s', async (file, text, rule) => {
    await using dir = project({
      [file]: text,
      'repo/b.ts': "import './a.js';\nexport const y = 1;\n",
    });
    cpSync(join(root, '.oxlintrc.json'), dir.join('.oxlintrc.json'));
    cpSync(join(root, 'tsconfig.json'), dir.join('tsconfig.json'));
    writeFileSync(dir.join('package.json'), '{"type":"module"}');
    symlinkSync(join(root, 'node_modules'), dir.join('node_modules'));
    const done = spawnSync(join(root, 'node_modules/.bin/oxlint'), [], {
      cwd: dir.path,
      encoding: 'utf8',
    });
    expect(done.stdout).toContain(rule);
    expect(done.status).toBe(1);
  });
});

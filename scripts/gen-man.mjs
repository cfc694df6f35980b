#!/usr/bin/env node
// Writes man/*.1 from the commands of the built program; with --check it only compares, and asks man
// whether every page is well-formed.
import { spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const dir = join(root, 'man');
const { manPages } = await import(join(root, 'dist/commands/manpages.js'));
const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
const pages = manPages(version);
mkdirSync(dir, { recursive: true });
const present = readdirSync(dir).filter((name) => name.endsWith('.1'));

if (!process.argv.includes('--check')) {
  for (const name of present) if (!pages.has(name)) rmSync(join(dir, name));
  for (const [name, text] of pages) writeFileSync(join(dir, name), text);
  console.log(`man/: ${pages.size} pages`);
  process.exit(0);
}

const problems = [];
for (const name of present)
  if (!pages.has(name)) problems.push(`man/${name} belongs to no command`);
for (const [name, text] of pages) {
  if (!present.includes(name)) problems.push(`man/${name} is missing`);
  else if (readFileSync(join(dir, name), 'utf8') !== text)
    problems.push(`man/${name} differs from the help texts`);
}
const checker = spawnSync('man', ['--version']);
if (checker.error !== undefined) {
  console.error(
    'man is not installed: the pages are compared, but not checked (apt install man-db)',
  );
} else {
  for (const name of present) {
    const { stderr, status } = spawnSync(
      'man',
      ['--warnings', '-E', 'UTF-8', '-l', '-Tutf8', '-Z', join(dir, name)],
      {
        encoding: 'utf8',
        env: { ...process.env, LC_ALL: 'C.UTF-8', MANROFFSEQ: '', MANWIDTH: '80' },
      },
    );
    if (status !== 0 || stderr.trim() !== '') problems.push(`man/${name}: ${stderr.trim()}`);
  }
}
for (const problem of problems) console.error(problem);
if (problems.length > 0) {
  console.error('npm run build && npm run man writes the pages again');
  process.exit(1);
}

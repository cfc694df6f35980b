/** Completes in the real shells: the sample tree has every kind of value, the registry must load without a complaint. */
import { spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { afterAll, beforeAll, expect } from 'vitest';
import { bashCompletion } from '../../../src/commands/shells/bash.js';
import { fishCompletion } from '../../../src/commands/shells/fish.js';
import { shellQuote } from '../../../src/commands/shells/model.js';
import { zshCompletion } from '../../../src/commands/shells/zsh.js';
import { requires } from '../../support/requires.js';
import { sampleCommands } from '../../support/sample-commands.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const commands = sampleCommands(() => Promise.resolve({ data: undefined }));

let dir: TempDir;
beforeAll(() => {
  dir = tempDir();
  mkdirSync(dir.join('here/a dir'), { recursive: true });
  writeFileSync(dir.join('here/a file'), '');
});
afterAll(() => dir.remove());

function runShell(shell: string, args: readonly string[], script: string): string {
  const done = spawnSync(shell, [...args, '-c', script], {
    cwd: dir.join('here'),
    encoding: 'utf8',
    env: { PATH: process.env['PATH'], HOME: dir.path, LC_ALL: 'C.UTF-8', TERM: 'dumb' },
    timeout: 60_000,
  });
  expect(done.stderr).toBe('');
  return done.stdout;
}

/** What is typed (the last word is being completed) → everything that must be offered, sorted. */
const CASES: readonly (readonly [typed: readonly string[], offered: readonly string[]])[] = [
  [['re'], ['restore']],
  [
    ['key', ''],
    ['add', 'list'],
  ],
  [['--repo', 'x', '-q', 'key', 'a'], ['add']],
  [
    ['restore', 'v', '/d', '--fo'],
    ['--force', '--format'],
  ],
  [
    ['restore', '--format', ''],
    ['qcow2', 'raw'],
  ],
  [['restore', '--into', 'a'], ['a dir']],
  [
    ['restore', 'v', 'a'],
    ['a dir', 'a file'],
  ],
  [
    ['restore', '--tag', 'x', 'v', 'a'],
    ['a dir', 'a file'],
  ],
  [['restore', '--at', ''], []],
  [['restore', 'v', 't', ''], []],
  [
    ['key', 'add', 'x', 'y', 'a'],
    ['a dir', 'a file'],
  ],
  [['key', 'add', '--js'], ['--json']],
  [['--password-f'], ['--password-file']],
];

requires({ tools: ['bash'] }).describe('bash completes', () => {
  const { it } = requires({});
  for (const [typed, offered] of CASES) {
    it(['b2', ...typed].join(' '), () => {
      const words = ['b2', ...typed].map(shellQuote).join(' ');
      const output = runShell(
        'bash',
        ['--norc'],
        `${bashCompletion(commands)}
COMP_WORDS=(${words}); COMP_CWORD=${typed.length}
_b2
((\${#COMPREPLY[@]} == 0)) || printf '%s\\n' "\${COMPREPLY[@]}"`,
      );
      expect(output.split('\n').filter(Boolean).toSorted()).toEqual(offered);
    });
  }

  it('an option joined by =', () => {
    const output = runShell(
      'bash',
      ['--norc'],
      `${bashCompletion(commands)}
COMP_WORDS=(b2 --repo = x restore --format = q); COMP_CWORD=7; _b2; printf '%s\\n' "\${COMPREPLY[@]}"`,
    );
    expect(output).toBe('qcow2\n');
  });

  it('with the real commands', () => {
    const output = runShell(
      'bash',
      ['--norc'],
      `set -u; ${bashCompletion()}
COMP_WORDS=(b2 comp); COMP_CWORD=1; _b2; printf '%s\\n' "\${COMPREPLY[@]}"`,
    );
    expect(output).toBe('completion\n');
  });
});

requires({ tools: ['fish'] }).describe('fish completes', () => {
  const { it } = requires({});
  const offers = (script: string, typed: string): readonly string[] =>
    runShell('fish', ['--no-config'], `${script}\ncomplete -C ${shellQuote(typed)}`)
      .split('\n')
      .filter(Boolean)
      .map((line) => (line.split('\t')[0] ?? '').replace(/\\(.)/g, '$1').replace(/\/$/, ''))
      .toSorted();
  for (const [typed, offered] of CASES) {
    const line = ['b2', ...typed].join(' ');
    it(line, () => {
      expect(offers(fishCompletion(commands), line)).toEqual(offered);
    });
  }

  it('with the real commands', () => {
    expect(offers(fishCompletion(), 'b2 comp')).toEqual(['completion']);
    expect(offers(fishCompletion(), 'b2 completion z')).toEqual(['zsh']);
  });
});

/**
 * Types into an interactive zsh on a terminal of its own (zpty), presses Tab, and reads back the line. zsh
 * inserts what is unambiguous, so each case says what the line must have become.
 */
const ZSH_CASES: readonly (readonly [typed: string, becomes: string])[] = [
  ['b2 re', 'b2 restore '],
  ['b2 key a', 'b2 key add '],
  ['b2 --repo x -q key l', 'b2 --repo x -q key list '],
  ['b2 restore v /d --forc', 'b2 restore v /d --force '],
  ['b2 restore --format q', 'b2 restore --format qcow2 '],
  ['b2 restore --format=q', 'b2 restore --format=qcow2 '],
  ['b2 restore --into a', 'b2 restore --into a\\ dir/'],
  ['b2 restore v a\\ f', 'b2 restore v a\\ file '],
  ['b2 restore a\\ f', 'b2 restore a\\ f'],
  ['b2 key add x y a\\ f', 'b2 key add x y a\\ file '],
  ['b2 key add --js', 'b2 key add --json '],
  ['b2 --password-f', 'b2 --password-file='],
];

requires({ tools: ['zsh'] }).describe('zsh completes', () => {
  const { it } = requires({});
  const complete = (script: string, cases: readonly string[]): readonly string[] => {
    const file = dir.join('_b2');
    writeFileSync(file, script);
    const typed = cases.map((line) => `press ${shellQuote(line)}`).join('\n');
    const output = runShell(
      'zsh',
      ['-f'],
      `zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1= PS2=; stty -echo; autoload -Uz compinit; compinit -D -u; source ${file}"
zpty -w z 'show() { print -r -- "LINE<$BUFFER>"; BUFFER=; }; zle -N show; bindkey "^X^X" show; bindkey "^I" complete-word; LISTMAX=-1; print READ""Y'
line=; while zpty -r z line; do [[ $line == *READY* ]] && break; done
press() {
  zpty -w -n z "$1"$'\\t\\x18\\x18'
  while zpty -r z line; do [[ $line == *'LINE<'* ]] && break; done
  print -r -- "$line"
}
${typed}
zpty -d z`,
    );
    return [...output.matchAll(/LINE<(.*)>/g)].map((match) => match[1] ?? '');
  };

  it('everything of the sample', () => {
    const lines = complete(
      zshCompletion(commands),
      ZSH_CASES.map(([typed]) => typed),
    );
    expect(lines).toEqual(ZSH_CASES.map(([, becomes]) => becomes));
  });

  it('with the real commands, as a file in $fpath too', () => {
    expect(complete(zshCompletion(), ['b2 comp', 'b2 completion f'])).toEqual([
      'b2 completion ',
      'b2 completion fish ',
    ]);
    expect(zshCompletion().split('\n', 1)[0]).toBe('#compdef b2');
  });
});

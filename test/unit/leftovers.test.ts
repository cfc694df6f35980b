/** Who takes away what a killed process leaves. That it happens at all when one is killed is tested with `serve nbd` (e2e). */
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { afterEach, expect, it } from 'vitest';

import { removeWhenKilled } from '../../src/leftovers.js';
import { requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});
const newDir = (): TempDir => {
  const dir = tempDir();
  dirs.push(dir);
  return dir;
};

// It cannot tell the end of its owner from `stop`: both are the end of its input.
requires({ tools: ['stat'] }).describe('removeWhenKilled', () => {
  it('removes a file, or a directory with what is in it', async () => {
    const dir = newDir();
    const file = dir.join("a b'$(c)\n");
    writeFileSync(file, 'x');
    mkdirSync(dir.join('d/e'), { recursive: true });
    writeFileSync(dir.join('d/e/f'), 'x');
    const watches = [await removeWhenKilled(file), await removeWhenKilled(dir.join('d'))];
    expect(existsSync(file)).toBe(true);
    for (const watch of watches) await watch.stop();
    expect(existsSync(file)).toBe(false);
    expect(existsSync(dir.join('d'))).toBe(false);
  });

  it('leaves what another has put in its place', async () => {
    const dir = newDir();
    const file = dir.join('socket');
    writeFileSync(file, 'mine');
    const watch = await removeWhenKilled(file);
    // The inode may be given to the next file at once.
    rmSync(file);
    writeFileSync(dir.join('new'), 'of another');
    renameSync(dir.join('new'), file);
    await watch.stop();
    expect(readFileSync(file, 'utf8')).toBe('of another');
  });

  it('ends by itself where there is nothing', async () => {
    const watch = await removeWhenKilled(newDir().join('nothing'));
    await watch.stop();
  });
});
